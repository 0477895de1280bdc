"""What can go wrong, without a word of HTTP: who serves requests gives each error its status."""


class EngineError(Exception):
    """A request that is not served; the message says why, and what to do."""


class InvalidInput(EngineError):
    """A request that cannot be served as it is; `argument` names what is wrong with it."""

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(message)
        self.argument = argument


class ContextTooLong(InvalidInput):
    """Prompt and answer do not fit: in the model's context, or in the KV cache.

    `num_tokens` are the prompt's, if they were counted; it may have `most`, if that is known.
    """

    def __init__(
        self,
        message: str,
        argument: str | None = None,
        *,
        num_tokens: int | None = None,
        most: int | None = None,
    ):
        super().__init__(message, argument)
        self.num_tokens, self.most = num_tokens, most


class TemplateTooCostly(EngineError):
    """The model's chat template takes too much time or memory to render what it is given."""

    argument = "messages"


class QueueFull(EngineError):
    """Too many requests are waiting; about half of them will be through in `retry_after` s."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine was closed, or has died."""


class ProcessUnavailable(EngineError):
    """A process that this request needs does not start, or is ended by others again and again."""

    retry_after = 5


class TimedOut(EngineError):
    """The request took longer than the engine's timeout."""


class StepFailed(EngineError):
    """The forward pass or the sampling of this request failed."""


class StartError(Exception):
    """A model cannot be loaded or served; the message is one sentence with the remedy."""
