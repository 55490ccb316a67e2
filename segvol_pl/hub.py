"""Models from the Hugging Face hub: `hub:OWNER/NAME[@REVISION]` in the place of a checkpoint's path.

1. `local` gives the path of any checkpoint; of one on the hub it downloads `model.safetensors`, or that of a MONAI
   bundle, into the cache of huggingface_hub. No other file of a repository is taken, so nothing can be unpickled.
2. `pinned` states the commit in place of a branch, so that a configuration names the same weights for ever. Commits are
   also in every manifest.
3. `make_repository` and `upload` put an exported folder onto the hub (`export hub=OWNER/NAME`).

huggingface_hub reads the address (HF_ENDPOINT), the token (HF_TOKEN), the cache (HF_HOME) and HF_HUB_OFFLINE from the
environment. What is in the cache is used without network.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from segvol_pl.errors import HubError

log = logging.getLogger(__name__)

Config = TypeVar("Config")

PREFIX = "hub:"
NAMED = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")
WEIGHTS = ("model.safetensors", "models/model.safetensors")
"""Where a repository may hold a model: an exported folder, a MONAI bundle."""
PINNED_KEYS = ("checkpoint", "pretrained", "weights", "source")
"""Keys whose value may name a model on the hub."""
COMMITS: dict[str, str] = {}
"""`hub:...` as it was given -> the commit that this process took."""


def local(place: str | Path) -> Path:
    """The path of a checkpoint. One on the hub is downloaded unless the cache has it. Raises HubError."""
    if not str(place).startswith(PREFIX):
        return Path(place)
    found = NAMED.fullmatch(str(place))
    if found is None:
        raise HubError(f"{place}: a model on the hub is named hub:OWNER/NAME, or hub:OWNER/NAME@REVISION")
    path = _download(str(place), found["repository"], found["revision"])
    commit = path.parts[len(path.parts) - path.parts[::-1].index("snapshots")]
    if COMMITS.get(str(place)) != commit:
        log.info("%s: commit %s", place, commit)
    COMMITS[str(place)] = commit
    return path


def pinned(config: Config) -> Config:
    """The configuration with the commit of each model that it names on the hub. Raises HubError."""
    named = {field.name for field in dataclasses.fields(config)} & {*PINNED_KEYS}  # type: ignore[arg-type]
    values = {name: str(getattr(config, name)) for name in named}
    found = {name: _pin(value) for name, value in values.items() if value.startswith(PREFIX)}
    return dataclasses.replace(config, **found) if found else config  # type: ignore[type-var]


def _pin(place: str) -> str:
    local(place)
    return f"{place.partition('@')[0]}@{COMMITS[place]}"


def _download(place: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _explained(place):
        try:
            return Path(hf_hub_download(repository, WEIGHTS[0], revision=revision))
        except EntryNotFoundError as error:
            # A hub that could not be reached is not tried again, which would take as long.
            unreached = isinstance(error, LocalEntryNotFoundError)
            return Path(hf_hub_download(repository, WEIGHTS[1], revision=revision, local_files_only=unreached))


def make_repository(repository: str, private: bool) -> None:
    """Make a repository for a model unless it is there, before there is anything to upload. Raises HubError."""
    from huggingface_hub import HfApi

    with _explained(f"{PREFIX}{repository}"):
        HfApi().create_repo(repository, private=private, exist_ok=True)


def upload(folder: Path, repository: str) -> str:
    """Upload all files of a folder as one commit.

    Returns:
        How the model is named from now on: `hub:OWNER/NAME@COMMIT`.

    Raises:
        HubError: it cannot be uploaded.
    """
    from huggingface_hub import HfApi

    with _explained(f"{PREFIX}{repository}"):
        made = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model of segvol-pl"
        )
    return f"{PREFIX}{repository}@{made.oid}"


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a HubError of one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{place}: is gated: request access on {constants.ENDPOINT}, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{place}: {constants.ENDPOINT} has no such repository, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{place}: has no such branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            problem = "HF_HUB_OFFLINE is set: download it once with network"
        else:
            problem = f"{constants.ENDPOINT} cannot be reached: check the network and HF_ENDPOINT"
        raise HubError(f"{place}: is not in the cache ({constants.HF_HUB_CACHE}), and {problem}") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{place}: holds no {' and no '.join(WEIGHTS)}: other files are not read") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{place}: HF_HUB_OFFLINE is set: unset it to upload") from error
    except errors.HFValidationError as error:
        raise HubError(f"{place}: is no name of a repository ({str(error).splitlines()[0]})") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = ": set HF_TOKEN to a token that may do this" if status in (401, 403) else ""
        raise HubError(f"{place}: {constants.ENDPOINT} refuses with status {status}{hint}") from error
    except Exception as error:
        # Of the HTTP library, which is another one in each major version of huggingface_hub.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise HubError(f"{place}: {constants.ENDPOINT} cannot be reached ({error or type(error).__name__})") from error
