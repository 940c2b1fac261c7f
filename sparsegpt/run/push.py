"""A result goes to the Hugging Face Hub, with the model card that lies in its folder.

The Hub's client does the work. A repository that must be made is private unless all may see it: what was published by
mistake cannot be taken back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.results import MARKER
from sparsegpt.incoming.hub import hub_reason
from sparsegpt.incoming.model_folder import check_folder

# The marker says what this machine may replace: nobody else's business.
LEFT_HERE = [MARKER]
# What an answer of the Hub means for who writes.
_STATUS = {
    401: "nobody is logged in, or the token is not valid any more: log in with `hf auth login`",
    403: "this account or its token may not write there: take a token that may, or another name",
}


def check_push(repository: str) -> None:
    """Ask whether this account may talk to the Hub at all, before hours of work go into what it should get.

    Raises SparseGPTError for a name that is none, without a network, and where nobody is logged in.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        named = repository.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise SparseGPTError(
            f"repository {repository!r} cannot be: expected ORG/NAME, of letters, digits, -, _ and .",
            settings=("push_to_hub",),
        )
    if constants.HF_HUB_OFFLINE:
        raise SparseGPTError("the Hub is switched off by HF_HUB_OFFLINE: unset it to push", settings=("push_to_hub",))
    with _in_words(repository):
        HfApi().whoami()


def push_folder(folder: Path, repository: str, *, public: bool = False, branch: str | None = None) -> str:
    """Upload a model folder; returns the address where it can be seen.

    Files that the repository has besides stay there. Raises SparseGPTError for a folder that is no whole model, and for
    whatever the Hub refuses; what had arrived by then need not be sent again.
    """
    from huggingface_hub import HfApi

    check_folder(folder)
    hub = HfApi()
    with _in_words(repository):
        place = hub.create_repo(repository, private=not public, exist_ok=True)
        if branch is not None:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            ignore_patterns=list(LEFT_HERE),
            commit_message="Upload a model pruned with sparsegpt",
        )
    return str(place) if branch is None else f"{place}/tree/{branch}"


@contextmanager
def _in_words(repository: str) -> Iterator[None]:
    """Turn whatever the client raises into one line."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        yield
    except SparseGPTError:
        raise
    except LocalTokenNotFoundError as error:
        raise SparseGPTError(f"nothing was pushed to {repository}: {_STATUS[401]}") from error
    except Exception as error:  # of any type, as its transports have their own
        reason = _STATUS.get(_status(error)) or hub_reason(error, repository) or first_line(error)
        raise SparseGPTError(f"the Hub did not take {repository}: {reason}") from error


def _status(error: BaseException | None) -> int:
    """The number of the Hub's answer that an error was raised from; 0 where it was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return int(error.response.status_code)
        error = error.__cause__
    return 0
