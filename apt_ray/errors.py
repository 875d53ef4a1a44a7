"""Every error that apt-ray raises on purpose; each message names the remedy.

AptError
├── SettingsError              a setting outside its range
├── DataError                  a folder or file of images that cannot be used
├── WriteError                 a file or folder that cannot be written
├── ImageError                 bytes that are not an acceptable image
│   ├── ImageTooLargeError     more bytes or pixels than allowed
│   └── UnsupportedImageError  a file type that is not accepted
├── BackboneError              a vision-language model that cannot be used
├── PromptSetError             a prompt set that is damaged or belongs to another backbone
├── ExportError                a graph that cannot be exported, or is not one of ours
├── RegistryError              the MLflow server refuses, or lacks what was asked for
│   ├── RegistryUnavailableError   it does not answer
│   └── RegistryConflictError      somebody else was faster
├── FeedbackError              no more feedback is kept
│   └── FeedbackQuotaError         of this caller
├── FleetError                 a fleet that cannot be deployed or reached
└── MissingDependencyError     a library is not installed; an ImportError, too
"""


class AptError(Exception):
    """Base of all errors that a caller of apt-ray may want to catch."""

    def __init__(self, message: str = "") -> None:
        # A message names files, and goes into JSON, tags and logs, which take UTF-8 alone.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class SettingsError(AptError):
    """A setting is outside its range."""


class DataError(AptError):
    """A folder or file of images cannot be used."""


class WriteError(AptError):
    """A file or folder cannot be written; what was there before is unharmed."""


class ImageError(AptError):
    """The bytes are not an image that can be inspected."""


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than the limits allow."""


class UnsupportedImageError(ImageError):
    """The file type of the image is not accepted."""


class BackboneError(AptError):
    """The vision-language model cannot be loaded or used."""


class PromptSetError(AptError):
    """The prompt set is damaged, of another format, or belongs to another backbone."""


class ExportError(AptError):
    """A graph cannot be exported, does not score as the detector does, or cannot be read."""


class RegistryError(AptError):
    """The MLflow server refuses, or lacks what was asked for."""


class RegistryUnavailableError(RegistryError):
    """No MLflow server answers; what is cached or kept on disk still works."""


class RegistryConflictError(RegistryError):
    """Somebody else moved the champion in the meantime; nothing was changed."""


class GateError(RegistryError):
    """A change was refused for what it would do to the detection of defects."""


class FeedbackError(AptError):
    """No more feedback is kept; what is there is unharmed."""


class FeedbackQuotaError(FeedbackError):
    """No more feedback is kept of this caller.

    Attributes:
        retry_after_s: seconds until it may be worth another try.
    """

    def __init__(self, message: str = "", *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FleetError(AptError):
    """The fleet cannot be deployed or reached."""


class MissingDependencyError(AptError, ImportError):
    """A library is not installed that this part of apt-ray needs; the message installs it."""
