// A photo that the pointer draws on: a rectangle, or strokes of a brush. Mouse, pen and finger are all pointers.
// Lengths that come in and go out are shares of the photo's width and height, because the preview is smaller than the photo.
const COLOUR = "#ff2fc4";

export default {
  template: `
    <div class="drawing" :data-tool="!brush ? 'rectangle' : erase ? 'erase' : 'paint'" :data-brush="brush">
      <img ref="photo" :src="src" :alt="label" draggable="false" @load="loaded">
      <div v-if="brush && box" class="outline" :style="{left: box[0] * 100 + '%', top: box[1] * 100 + '%', width: box[2] * 100 + '%', height: box[3] * 100 + '%'}"></div>
      <canvas ref="canvas" aria-hidden="true" :style="{opacity: brush ? 0.6 : 1}"
        @pointerdown="down" @pointermove="moved" @pointerup="up" @pointercancel="up"></canvas>
    </div>`,
  props: { src: String, label: String, brush: Number, erase: Boolean, mask: String, box: Array },
  data: () => ({ last: null, corner: null }),
  watch: {
    mask() { this.showMask(); },
    box() { if (!this.brush) this.showBox(this.box); },
  },
  methods: {
    loaded() {
      const { canvas, photo } = this.$refs;
      canvas.width = photo.naturalWidth;
      canvas.height = photo.naturalHeight;
      this.brush ? this.showMask() : this.showBox(this.box);
    },
    at(event) {
      const place = this.$refs.canvas.getBoundingClientRect();
      const share = (value, size) => Math.min(1, Math.max(0, value / size));
      return [share(event.clientX - place.left, place.width), share(event.clientY - place.top, place.height)];
    },
    down(event) {
      if (event.button > 0 || !this.$refs.canvas.width) return;
      event.preventDefault();
      this.$refs.canvas.setPointerCapture(event.pointerId);
      this.corner = this.last = this.at(event);
      if (this.brush) this.stroke(this.last);
    },
    moved(event) {
      if (!this.last) return;
      const here = this.at(event);
      this.brush ? this.stroke(here) : this.showBox(this.between(here));
      this.last = here;
    },
    up(event) {
      if (!this.last) return;
      this.last = null;
      this.brush ? this.$emit("painted", this.asMask()) : this.$emit("drawn", this.between(this.at(event)));
    },
    between([x, y]) {
      const [a, b] = this.corner;
      return [Math.min(a, x), Math.min(b, y), Math.abs(x - a), Math.abs(y - b)];
    },
    context() {
      return this.$refs.canvas.getContext("2d", { willReadFrequently: true });
    },
    showBox(box) {
      const context = this.context(), { width, height } = this.$refs.canvas;
      context.clearRect(0, 0, width, height);
      if (!box || !width) return;
      const scale = width / (this.$refs.canvas.clientWidth || width), inside = [box[0] * width, box[1] * height, box[2] * width, box[3] * height];
      for (const [colour, line] of [["black", 5], ["white", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = line * scale;
        context.strokeRect(...inside);
      }
    },
    stroke(here) {
      const context = this.context(), { width, height } = this.$refs.canvas;
      context.globalCompositeOperation = this.erase ? "destination-out" : "source-over";
      context.strokeStyle = COLOUR;
      context.lineWidth = this.brush * Math.max(width, height);
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      context.moveTo(this.last[0] * width, this.last[1] * height);
      context.lineTo(here[0] * width + 0.01, here[1] * height);
      context.stroke();
      context.globalCompositeOperation = "source-over";
    },
    asMask() {
      const { width, height } = this.$refs.canvas, image = this.context().getImageData(0, 0, width, height);
      let painted = 0;
      for (let k = 0; k < image.data.length; k += 4) {
        const value = image.data[k + 3] > 127 ? 255 : 0;
        painted |= value;
        image.data.fill(value, k, k + 3);
        image.data[k + 3] = 255;
      }
      const copy = Object.assign(document.createElement("canvas"), { width, height });
      copy.getContext("2d").putImageData(image, 0, 0);
      return painted ? copy.toDataURL("image/png") : "";
    },
    showMask() {
      const context = this.context(), { width, height } = this.$refs.canvas;
      if (!width || this.mask === this.asMask()) return;
      context.clearRect(0, 0, width, height);
      if (!this.mask) return;
      const file = new Image();
      file.onload = () => {
        context.drawImage(file, 0, 0, width, height);
        const image = context.getImageData(0, 0, width, height);
        const [red, green, blue] = [1, 3, 5].map((k) => parseInt(COLOUR.slice(k, k + 2), 16));
        for (let k = 0; k < image.data.length; k += 4) image.data.set([red, green, blue, image.data[k]], k);
        context.putImageData(image, 0, 0);
      };
      file.src = this.mask;
    },
  },
};
