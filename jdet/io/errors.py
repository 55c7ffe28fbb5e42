"""The error that reading a checkpoint, a tokenizer or a model name raises."""


class CheckpointError(ValueError):
    """A model cannot be read as asked: wrong name, wrong kind of file, damage, unsupported kind.

    The message is one or two lines that name what was given and what is allowed; a
    command line prints it as it stands.
    """
