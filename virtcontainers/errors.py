"""What can go wrong, by what a caller can do about it.

Every message names the thing (file, key, container, QMP command), what was found and what was expected.
The shim maps these classes to containerd's codes.
"""


class KataError(Exception):
    """Any refusal or failure of ours; the message is fit for a user's terminal."""


class InvalidArgumentError(KataError):
    """The caller asked for something that can never be: a bad bundle, spec, key or annotation."""


class NotFoundError(KataError):
    """The named sandbox, container, process or file does not exist."""


class AlreadyExistsError(KataError):
    """The named sandbox, container or process exists already."""


class FailedPreconditionError(KataError):
    """The thing exists but is in a state that forbids the request."""


class UnimplementedError(KataError):
    """We, or the guest's agent, do not have this."""


class DeadlineExceededError(KataError):
    """Somebody (QEMU, the agent, virtiofsd) did not answer in the configured time."""


class UnavailableError(KataError):
    """The machine or its agent is gone."""
