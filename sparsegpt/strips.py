"""Work on a large matrix strip by strip, so that what each step needs beside it stays small."""


def strips(size: int, step: int) -> list[slice]:
    """range(size) in slices of `step`."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
