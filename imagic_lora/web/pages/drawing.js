// A photo that the pointer draws on: a rectangle, or strokes of a brush. Mouse, pen and finger are all pointers; the brush also has keys.
// Lengths that come in and go out are shares of the photo's width and height, because the preview is smaller than the photo.
const COLOUR = "#ff2fc4";
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = "Brush on the photo. The arrow keys move it, faster with Shift. Space puts it down and lifts it. Control Z undoes.";

export default {
  template: `
    <div class="drawing" :data-tool="!brush ? 'rectangle' : erase ? 'erase' : 'paint'" :data-brush="brush">
      <img ref="photo" :src="src" :alt="label" draggable="false" @load="loaded">
      <div v-if="brush && box" class="outline" :style="{left: box[0] * 100 + '%', top: box[1] * 100 + '%', width: box[2] * 100 + '%', height: box[3] * 100 + '%'}"></div>
      <canvas ref="canvas" :style="{opacity: brush ? 0.6 : 1}" :aria-hidden="brush ? null : 'true'" :tabindex="brush ? 0 : null"
        :role="brush ? 'application' : null" :aria-label="brush ? keys : null" @keydown="key" @focus="focused" @blur="lift(); at_ = null"
        @pointerdown="down" @pointermove="moved" @pointerup="up" @pointercancel="up" @pointerleave="at_ = null"></canvas>
      <div v-if="brush && at_" class="tip" :class="{lowered}" :style="tip()"></div>
      <span v-if="brush" class="spoken" role="status">{{ lowered ? "Brush down" : "" }}</span>
    </div>`,
  props: { src: String, label: String, brush: Number, erase: Boolean, mask: String, box: Array },
  data: () => ({ last: null, corner: null, at_: null, lowered: false, size: [1, 1], keys: KEYS, known: "", sent: [] }),
  // at_: where the brush is shown; known: the mask on the canvas; sent: masks that the server will send back
  watch: {
    mask() {
      const echo = this.sent.indexOf(this.mask); // the next stroke may have begun since: it must not be erased
      if (echo >= 0) return this.sent.splice(0, echo + 1);
      this.sent = [];
      this.showMask();
    },
    box() { if (!this.brush) this.showBox(this.box); },
  },
  methods: {
    loaded() {
      const { canvas, photo } = this.$refs;
      this.size = [photo.naturalWidth, photo.naturalHeight];
      [canvas.width, canvas.height] = this.size;
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
      this.lift();
      if (this.brush) this.stroke(this.corner, this.last);
    },
    moved(event) {
      const here = this.at(event);
      this.at_ = event.pointerType === "touch" ? null : here;
      if (!this.last) return;
      this.brush ? this.stroke(this.last, here) : this.showBox(this.between(here));
      this.last = here;
    },
    up(event) {
      if (!this.last) return;
      this.last = null;
      this.brush ? this.tell() : this.$emit("drawn", this.between(this.at(event)));
    },
    focused() {
      if (this.brush && this.$refs.canvas.matches(":focus-visible")) this.at_ = [0.5, 0.5];
    },
    tip() { // a circle of the brush: lengths are shares of the side on which they lie
      const [width, height] = this.size, diameter = 100 * this.brush * Math.max(width, height);
      return { left: `${this.at_[0] * 100}%`, top: `${this.at_[1] * 100}%`, width: `${diameter / width}%`, height: `${diameter / height}%` };
    },
    tell() {
      const mask = this.asMask();
      if (mask === this.known) return;
      this.known = mask;
      this.sent.push(mask);
      this.$emit("painted", mask);
    },
    lift() {
      if (this.lowered) this.tell();
      this.lowered = false;
    },
    key(event) {
      if (!this.brush || !this.$refs.canvas.width || this.last) return;
      const from = this.at_ || [0.5, 0.5], step = event.shiftKey ? 0.1 : 0.02, move = MOVES[event.key];
      if (move) {
        this.at_ = from.map((share, k) => Math.min(1, Math.max(0, share + move[k] * step)));
        if (this.lowered) this.stroke(from, this.at_);
      } else if (event.key === " " || event.key === "Enter") {
        if (event.repeat) return event.preventDefault();
        this.at_ = from;
        if (this.lowered) this.lift();
        else {
          this.lowered = true;
          this.stroke(from, from);
        }
      } else if (event.key === "Escape") this.lift();
      else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
        this.lift();
        this.$emit("undo");
      } else return;
      event.preventDefault();
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
    stroke(from, here) {
      const context = this.context(), { width, height } = this.$refs.canvas;
      context.globalCompositeOperation = this.erase ? "destination-out" : "source-over";
      context.strokeStyle = COLOUR;
      context.lineWidth = this.brush * Math.max(width, height);
      context.lineCap = context.lineJoin = "round";
      context.beginPath();
      context.moveTo(from[0] * width, from[1] * height);
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
      this.known = this.mask;
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
