"""What a run writes besides its report: rehearsed before the first block, so that nothing can fail after the last.

Everything beside the weights is written then, and waits in the work folder for the weights.
"""

import shutil
from pathlib import Path
from typing import Any

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.files.beside import some
from sparsegpt.files.figures import CARD_NAME
from sparsegpt.files.folders import is_full_disk
from sparsegpt.model.export import check_names, write_beside, write_config, write_weights
from sparsegpt.model.loading import LoadedModel
from sparsegpt.run.model_card import Card


def rehearse(loaded: LoadedModel, waiting: Path, card: Card) -> None:
    """Write everything but the weights to the folder `waiting`, as it will be; SparseGPTError for what cannot be.

    Names, shapes and dtypes of the weights are looked at. Where links that lead out of the source have been left
    behind, the tokenizer must load from what is there.
    """
    check_names(loaded)
    try:
        shutil.rmtree(waiting, ignore_errors=True)  # of a run that was killed
        waiting.mkdir()
        write_beside(loaded, waiting)
        (waiting / CARD_NAME).write_bytes(card.added_to(loaded.source.card))
    except (OSError, ValueError, TypeError) as error:
        refusal = "no space left for" if is_full_disk(error) else "cannot write"
        raise SparseGPTError(f"{refusal} what lies beside the weights of {loaded.name}: {first_line(error)}") from error
    left = loaded.source.beside.outside
    if left and not _loads(waiting, loaded.tokenizer, trust_remote_code=card.trust_remote_code):
        raise SparseGPTError(
            f"model {loaded.name!r} needs files that are links out of its folder, which are not followed "
            f"({some(left)}): put the files themselves there"
        )


def save(loaded: LoadedModel, waiting: Path, target: Path) -> None:
    """Write the weights to the folder `target`, and move there what has waited for them."""
    for path in sorted(waiting.iterdir()):
        path.rename(target / path.name)
    waiting.rmdir()
    write_config(loaded, target)  # a head may have parted from the embedding meanwhile
    write_weights(loaded, target)


def _loads(folder: Path, tokenizer: Any, *, trust_remote_code: bool) -> bool:
    """Whether a config can be read from a folder, and that very tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception:  # whatever a file that is not there leads to
        return False
    return bool(found.get_vocab() == tokenizer.get_vocab())
