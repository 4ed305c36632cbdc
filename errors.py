"""Every error that a caller can meet, in one tree:

    NightschoolError
      SettingsError      a setting is unknown or has a value that cannot be used
      InputError         an argument or an imported line is malformed
      StoreError         the memory cannot be read or written
        SchemaOutdated   the database was written by another version
        NotFound         no row has that id (in that scope)
        Overtaken        what a reply was made of changed before it could be recorded; ask again
        Unerased         the rows are deleted as `receipt` says, but not all their bytes
      TrainingError      a phase did not learn, or could not run
      GateRefused        an adapter may not serve: unjudged, rejected, damaged or tainted
      NightRunning       (pipelines.lock) another night runs
      ServingError       a base or an adapter cannot be loaded, or an answer cannot be made

The message names the thing, the value and the next step.
"""

from typing import Any


class NightschoolError(Exception):
    """Base of all errors raised on purpose."""


class SettingsError(NightschoolError):
    pass


class InputError(NightschoolError):
    pass


class StoreError(NightschoolError):
    pass


class SchemaOutdated(StoreError):
    pass


class NotFound(StoreError):
    pass


class Overtaken(StoreError):
    pass


class Unerased(StoreError):
    def __init__(self, message: str, receipt: Any) -> None:
        super().__init__(message)
        self.receipt = receipt  # what `forget_apply` would have returned


class TrainingError(NightschoolError):
    pass


class GateRefused(NightschoolError):
    pass


class ServingError(NightschoolError):
    pass
