"""The exception tree and the one form of a message: what is wrong, where, got, expected, fix."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_BAD_ROWS = 3
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class TorchkeepError(Exception):
    """Something that the person at the keyboard can mend.

    ``what`` is one line; ``where`` names the file, key, sample or step; ``fix`` is a command or setting that exists.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, *, where: object = "", got: object = "", expected: object = "", fix: str = ""):
        self.what = what
        self.where = str(where)
        self.got = str(got)
        self.expected = str(expected)
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        rows = [("where", self.where), ("got", self.got), ("expected", self.expected), ("fix", self.fix)]
        return "\n".join([self.what, *(f"  {name + ':':<9} {text}" for name, text in rows if text)])

    def said(self) -> str:
        """The whole text as the command line prints it, beginning with the error's name."""
        return printable(f"{type(self).__name__}: {self}")


class SettingsError(TorchkeepError):
    """A recipe, a keyword or a ``--set`` that cannot mean anything."""


class DataError(TorchkeepError):
    """Data that are missing, empty or of another form than stated."""


class BadSampleError(DataError):
    """One sample that cannot be read."""


class LabelError(DataError):
    """Labels that the model has no output for; ``rows`` are their places in the batch."""

    def __init__(self, what: str, rows: list[int], *, got: str, expected: str, fix: str):
        super().__init__(what, where=f"rows {rows[:16]} of the batch", got=got, expected=expected, fix=fix)
        self.rows = rows


class ModelError(TorchkeepError):
    """A model that cannot be built or does not fit the data or the loss."""


class PreflightError(ModelError):
    """A training of which preflight says that nothing can be learned."""


class UntrustedCodeError(ModelError):
    """Code named by a run's folder that this machine has not seen before."""


class RunFolderError(TorchkeepError):
    """A run's folder that is missing, in use or of another form than stated."""


class CheckpointError(TorchkeepError):
    """A checkpoint that is missing, damaged or does not fit."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


class PackageError(TorchkeepError):
    """A package that is missing, damaged, or nothing that was written as one."""


class RunFailedError(TorchkeepError):
    """A training that began and could not go on."""

    exit_code = EXIT_FAILED


class NonFiniteLossError(RunFailedError):
    """A loss that became NaN or infinite; the last good checkpoint stays."""


class StorageError(RunFailedError):
    """A write that the disk refused; nothing acknowledged before is lost."""


class PreemptedError(TorchkeepError):
    """SIGTERM arrived; the state was saved."""

    exit_code = EXIT_PREEMPTED


class Interrupted(KeyboardInterrupt):
    """Ctrl-C arrived; the state was saved at a step's end."""

    exit_code = EXIT_INTERRUPTED

    def __init__(self, what: str, *, fix: str = ""):
        self.what = what
        self.fix = fix
        super().__init__(what if not fix else f"{what}\n  fix:      {fix}")


def printable(text: str) -> str:
    """Without what rules a terminal or turns its lines around: a package's names are a stranger's words."""
    return "".join(sign if sign in "\n\t" or sign.isprintable() else "\ufffd" for sign in text)


def nearest(word: str, choices: list[str]) -> str:
    """A did-you-mean clause, empty where nothing is near."""
    from difflib import get_close_matches

    found = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else ""
