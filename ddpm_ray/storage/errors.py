"""StorageError, and any back end's exception as one: reason and remedy in one line."""

import errno

from ddpm_ray.redaction import sanitize


class StorageError(RuntimeError):
    """A failed storage operation; args are the strings (url, reason, remedy)."""

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


class PermanentStorageError(StorageError):
    """An error that lasts until a person mends it; args are (url, reason, remedy)."""


class MissingObjectError(StorageError):
    """No object where one is expected; args are (url, reason, remedy)."""


class NotAnObjectError(PermanentStorageError):
    """A folder where an object is expected; args are (url, reason, remedy)."""


def storage_error(url: str, error: Exception, local: bool) -> StorageError:
    """Return the error with its reason and remedy in one line."""
    if isinstance(error, StorageError):
        return error
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return PermanentStorageError(
            url, "the disk is full", "free some space or choose another path"
        )
    if isinstance(error, IsADirectoryError):
        remedy = "move the folder away, and restore the object if you have a copy"
        return NotAnObjectError(url, "a folder is where an object should be", remedy)
    if isinstance(error, FileNotFoundError):
        return MissingObjectError(url, "no such file or object", "check the name and the bucket")
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        remedy = "choose another path, or mount it for writing"
        return PermanentStorageError(url, "this file system is read-only", remedy)
    if local and isinstance(error, PermissionError):
        remedy = "check its owner and permissions, and whether its file system allows this"
        return PermanentStorageError(url, f"not permitted ({text})", remedy)
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        remedy = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        return StorageError(url, f"access denied ({text})", remedy)
    if isinstance(error, (ImportError, ValueError)) and "rotocol" in text:
        return StorageError(url, text, "use a local path, s3://, https:// or another fsspec URL")
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if isinstance(error, (ConnectionError, TimeoutError)) or "Connect" in names or "Time" in names:
        remedy = "check that the endpoint is up and that its address (AWS_ENDPOINT_URL) is right"
        return StorageError(url, f"no answer ({text})", remedy)
    remedy = "check the disk and the path" if local else "check the address and try again"
    return StorageError(url, text, remedy)
