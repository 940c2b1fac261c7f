"""The one exception that the command line shows as a single line, without a traceback."""


class SparseGPTError(Exception):
    """Input or state that the engine refuses: the message says what was expected, what was found and what to do."""
