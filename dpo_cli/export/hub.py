"""An export on the Hugging Face Hub: what stands where in the repository, and the push in one commit.

What `from_pretrained("user/name")` reads is the repository's root, so one model stands there: the merged one, or the
adapter where it is alone. With both the adapter goes into `adapter/`, for transformers takes any repository with an
adapter_config.json at its root for that adapter. GGUF files and the Modelfile keep each other company at the root.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

from dpo_cli import __version__
from dpo_cli.disk import read_json
from dpo_cli.errors import DpoError
from dpo_cli.published import clean
from dpo_cli.recipe import Recipe

ROOT_FIRST = ("merged", "adapter", "gguf", "ollama")  # whose card is the repository's

# Files at the root that decide which model a repository loads as; left over from another push they would win.
WEIGHTS = ("adapter_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")

NAMES_THE_BASE = ("adapter_config.json", "verify.json")  # by its absolute path, which is nobody else's business


def login(recipe: Recipe) -> str:
    """Find the token for a push.

    Raises:
        DpoError: there is none.
    """
    if token := get_token():
        return token
    raise DpoError(
        f"not logged in to the Hub, so nothing can be pushed to {recipe.export.hub}",
        where=recipe.where("export", "hub"),
        hint="run `hf auth login` or set HF_TOKEN, then export again",
    )


def path_in_repo(kind: str, name: str, formats: Iterable[str]) -> str:
    """Where a file of `export/<kind>/` goes, given all formats of the push."""
    return f"adapter/{name}" if kind == "adapter" and "merged" in formats else name


def listing(recipe: Recipe, sent: Sequence[tuple[str, int]]) -> str:
    """The file list as it is shown before a push: lines of bytes and path, and the sum."""
    kind = "private" if recipe.export.hub_private else "public"
    lines = [f"  {size:>15,}  {name}" for name, size in sent]
    total = sum(size for _, size in sent)
    return "\n".join([f"hub: {recipe.export.hub} ({kind}), {len(sent)} files, {total:,} bytes", *lines])


def push(recipe: Recipe, folder: Path, quiet: bool) -> str:
    """Send the formats of a complete export to `export.hub` in one commit: all of it arrives, or nothing.

    Args:
        folder: the finished `runs/<name>/export`, with its `verify.json`.
        quiet: print neither the list of files nor progress.

    Returns:
        The repository's address.

    Raises:
        DpoError: there is no login, no permission, no network, the repository is public though `export.hub_private` is
            true, or holds another model's weights. The export on disk stays as it is in any case.
    """
    token, name = login(recipe), str(recipe.export.hub)
    sent = contents(folder, recipe.export.formats)
    if not quiet:
        sizes = [(place, len(one) if isinstance(one, bytes) else one.stat().st_size) for place, one in sent.items()]
        print(listing(recipe, sizes), flush=True)

    (disable_progress_bars if quiet else enable_progress_bars)()
    api = HfApi()
    try:
        name = api.create_repo(name, private=recipe.export.hub_private, exist_ok=True).repo_id  # with whose it is
        _refuse_what_is_there(recipe, api.model_info(name), sent)
        operations = [CommitOperationAdd(place, one) for place, one in sent.items()]
        api.create_commit(name, operations, commit_message=f"{recipe.name}, by dpo-cli {__version__}")
    # hf_xet, which uploads large files, knows no errors of its own but RuntimeError.
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = f" (HTTP {status})" if status else ""
        message = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
        raise DpoError(
            f"the push to {name} failed{answer}: {message.splitlines()[0].replace(token, '***')}",
            where=recipe.where("export", "hub"),
            hint="check the network (HF_ENDPOINT, HF_HUB_OFFLINE), and by `hf auth whoami` that the login may write to "
            f"{name.partition('/')[0]}'s repositories; then export again: the export itself is complete in {folder}",
        ) from error
    return f"{api.endpoint}/{name}"


def contents(folder: Path, formats: Sequence[str]) -> dict[str, Path | bytes]:
    """Collect what a push of this export sends: path in the repository -> file, or its content without local paths.

    Of two files with one path (cards; a GGUF that two formats share) the first counts.
    """
    found = {"verify.json": folder / "verify.json"}
    for kind in ROOT_FIRST:
        for path in sorted((folder / kind).rglob("*")) if kind in formats else ():
            if path.is_file():
                found.setdefault(path_in_repo(kind, path.relative_to(folder / kind).as_posix(), formats), path)
    return {name: _public(found[name]) for name in sorted(found)}


def _public(path: Path) -> Path | bytes:
    if path.name not in NAMES_THE_BASE:
        return path
    known = read_json(path)
    public = clean(known)
    return path if public == known else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse_what_is_there(recipe: Recipe, info: Any, sent: Iterable[str]) -> None:
    """Neither publish what was to be private, nor lay this model's files among another's."""
    if recipe.export.hub_private and not info.private:
        raise DpoError(
            f"{recipe.export.hub} is there already and public, but export.hub_private is true; nothing was pushed",
            where=recipe.where("export", "hub_private"),
            hint="name another repository, make that one private on the Hub, or set export.hub_private: false",
        )
    there = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    others = [one for one in there if one not in sent and any(fnmatch(one, kind) for kind in WEIGHTS)]
    if others:
        raise DpoError(
            f"{recipe.export.hub} holds weights that these would be mixed with ({', '.join(others[:3])}); "
            "nothing was pushed",
            where=recipe.where("export", "hub"),
            hint="name another repository in export.hub, or delete those files on the Hub",
        )
