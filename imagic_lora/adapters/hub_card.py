"""The model card of an adapter on the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..bases.loading.known import SHIPPED, known_base, licence_of, local_path
from ..core.text import slug
from .adapter import Adapter
from .record import CARD, PREVIEW, Record

_LICENCES = {  # the Hub's own names of licences; every other is "other" there, with a name
    "Apache-2.0": "apache-2.0",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
}
_END = b"<!-- imagic-lora: below this line is the README.md of the adapter, unchanged -->\n"


_WITHHELD = """The photo is not part of this repository. Edits that start from noise work without it; those that start from the photo, and
`--keep`, need its file: `imagic-lora edit NAME --photo FILE`. An edit at eta 0 nevertheless shows nearly the photo: weights and embeddings
were trained on it.

"""


def hub_id(adapter: Adapter) -> str | None:
    """Repository of the adapter's base on the Hub; None for a base of this machine or of this package."""
    source = known_base(adapter.record.base.name, adapter.record.base.revision).source
    try:
        validate_repo_id(source)
    except HFValidationError:  # a path
        return None
    return source if source.count("/") == 1 and local_path(source) is None else None


def only_here(adapter: Adapter) -> bool:
    """Whether the base is a folder or file of this machine, which nobody else finds under its name."""
    source = known_base(adapter.record.base.name, adapter.record.base.revision).source
    return hub_id(adapter) is None and adapter.record.base.name not in SHIPPED and source not in SHIPPED


def card_data(adapter: Adapter, record: Record | None = None) -> ModelCardData:
    """What the Hub searches and shows: base model, relation (its search term is ``base_model:adapter:...``), licence, tags and widget.

    Args:
        adapter: the adapter.
        record: the record that is sent; None for that of the adapter.
    """
    record = record or adapter.record
    base, licence = hub_id(adapter), licence_of(record.base.name, record.base.revision)
    mode = {"lora": ["lora"], "full": ["full-fine-tuning"], "embedding": ["embedding"]}[record.config.tune.mode]
    fields: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    if licence:
        named = _LICENCES.get(licence)
        fields |= {"license": named} if named else {"license": "other", "license_name": slug(licence, "other")}
    if PREVIEW in record.files:
        fields["widget"] = [{"text": record.prompt, "output": {"url": PREVIEW}}]
    tags = [record.config.method, "imagic-lora", *mode, "diffusers", "image-to-image", "text-to-image"]
    return ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", tags=list(dict.fromkeys(tags)), instance_prompt=record.prompt, **fields
    )


def hub_card(adapter: Adapter, record: Record) -> bytes:
    """Returns the model card: metadata, pictures or a note that the photo is withheld, then the adapter's own ``README.md``.

    Args:
        adapter: the adapter.
        record: the record that is sent.
    """
    shown = "<Gallery />\n\n" if record.source.withheld is None else _WITHHELD
    front = f"---\n{card_data(adapter, record).to_yaml()}\n---\n\n{shown}".encode()
    own = (adapter.folder / CARD).read_bytes() if CARD in adapter.record.files else b""
    return front + _END + own


def without_front(card: bytes) -> bytes:
    """Returns the adapter's own ``README.md`` of a model card; all of a card that no push made."""
    return card.partition(_END)[2] if _END in card else card
