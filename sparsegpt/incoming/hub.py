"""The Hugging Face Hub: one quick question before its client begins, and in words why something was not to be had."""

# Modules of the libraries, one or another of which the client speaks through.
_TRANSPORT = ("httpx", "httpcore", "requests", "urllib3")
# What a model without this file is.
_WITHOUT = {"config.json": ", so it is an adapter, GGUF weights or another form that transformers does not load"}


def ask_hub(repository: str, file: str, revision: str | None = None, kind: str = "model") -> None:
    """Ask once for a file that is not in the cache: where nobody answers, the client repeats itself for half a minute.

    kind: "model" or "dataset". Raises what the client raises.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if not constants.HF_HUB_OFFLINE:
        get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind, revision=revision))


def hub_reason(error: BaseException, file: str, revision: str | None = None) -> str | None:
    """Why a file was not to be had, of an error of the client or one that was raised from such; None for others."""
    from huggingface_hub import errors

    reasons = (
        (errors.GatedRepoError, "it is gated: accept its terms on its page, and log in with `hf auth login`"),
        (errors.RevisionNotFoundError, f"it has no revision {revision}"),
        (errors.RepositoryNotFoundError, "there is none of this name, or it is private: log in with `hf auth login`"),
        ((errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled), "it is not in the cache, and nobody answers"),
        (errors.EntryNotFoundError, f"it has no {file}{_WITHOUT.get(file, '')}"),
    )
    cause: BaseException | None = error
    while cause is not None:
        for types, reason in reasons:
            if isinstance(cause, types):
                return reason
        if type(cause).__module__.startswith(_TRANSPORT):
            return "nobody answers"
        cause = cause.__cause__ or cause.__context__
    return None
