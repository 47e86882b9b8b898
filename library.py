"""The prompt library: `--text lib:word_word` stands for the one prompt of a file that has these words.

A library is a JSON file: {"name": "prompt"}, or {"group": ["prompt", ...]} as threestudio's prompt_library.json, or ["prompt", ...].
"""

import json
import re
from difflib import get_close_matches

from errors import UserError
from layers import find

PREFIX = "lib:"
SHOWN = 8  # candidates that an error lists


def resolve(text: str, path: str) -> str:
    """The prompt that `text` stands for: itself, or with the prefix `lib:` the one in the library at `path` (from here, or from this program's
    folder) that has every one of the words, which `_` separates; case does not matter.

    An entry whose name, or whose prompt as a whole, is these words is the one, whatever else has them too: so every entry can be reached.
    Else words are whole words, or parts of words where no prompt has all of them whole. Raises UserError, with the candidates, unless
    there is exactly one.
    """
    if not text.startswith(PREFIX):
        return text
    label = f"--text {text}"
    prompts = read(path)
    wanted = _words(text.removeprefix(PREFIX))
    if not wanted:
        raise UserError(f"{label}: name some words of the prompt, as in lib:{next(iter(prompts), 'red_chair')}")
    exact = [prompt for name, prompt in prompts.items() if wanted in (_words(name), _words(prompt))]
    whole = [name for name, prompt in prompts.items() if set(wanted) <= {*_words(prompt), *_words(name)}]
    parts = [name for name, prompt in prompts.items() if all(word in prompt.lower() for word in wanted)]
    found = whole or parts
    if len(set(exact)) == 1:
        return exact[0]
    if len({prompts[name] for name in found}) == 1:
        return prompts[found[0]]
    if found:
        raise UserError(f"{label}: {len(found)} prompts have these words; say more, or name one: {_some(found)}")
    known = {word for name, prompt in prompts.items() for word in (*_words(prompt), *_words(name))}
    near = [close for word in wanted if word not in known for close in get_close_matches(word, known, n=2)]
    close = get_close_matches("_".join(wanted), prompts, n=SHOWN, cutoff=0.4)
    close += [name for name, prompt in prompts.items() if set(near) & set(_words(prompt)) and name not in close]
    raise UserError(
        f"{label}: no prompt of {path} has all these words" + (f"; near: {_some(close)}" if close else "; look into it")
    )


def read(path: str) -> dict[str, str]:
    """The prompts by name; those without a name are called by their words. Raises UserError if the file cannot be used."""
    label = f"--prompt_library {path}"
    try:
        content = json.loads(find(path, "--prompt_library").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: cannot be read as JSON: {error}") from None
    groups = content.items() if isinstance(content, dict) else [("", content)]
    prompts: dict[str, str] = {}
    for name, value in groups:
        if isinstance(value, str):
            prompts[name] = value
        elif isinstance(value, list) and all(isinstance(prompt, str) for prompt in value):
            prompts |= {"_".join(_words(prompt)): prompt for prompt in value}
        else:
            raise UserError(f'{label}: expected {{"name": "prompt", ...}} or lists of prompts')
    if not prompts:
        raise UserError(f"{label}: there is no prompt in it")
    return prompts


def _words(text: str) -> list[str]:
    """Lower-case words; an apostrophe or a hyphen inside belongs to its word."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
