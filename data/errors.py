"""The one error class for mistakes a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake of the user's, told without a traceback; the command exits with code 2.

    Args:
        given: what was given, e.g. ``"retrieval.budget=-3"``.
        expected: what would have been right, e.g. ``"a positive whole number"``.
        action: what to do now, as an imperative sentence.

    The three are kept apart so that no message can leave one out.
    """

    def __init__(self, given: str, *, expected: str, action: str) -> None:
        self.given, self.expected, self.action = given, expected, action
        self.problems: list[UserError] = [self]
        super().__init__(f"given: {given}\nexpected: {expected}\nwhat to do: {action}")

    @classmethod
    def collect(cls, errors: Sequence[UserError]) -> UserError:
        """Several mistakes in one error, so that a user mends them in one go.

        Args:
            errors: at least one error; those of a collected one are taken one by one.

        Returns:
            The only error, or one whose message lists all of them, and whose ``problems`` they are.
        """
        if len(errors) == 1:
            return errors[0]
        errors = [problem for error in errors for problem in error.problems]
        combined = cls(
            f"{len(errors)} problems",
            expected="; ".join(error.expected for error in errors),
            action="; ".join(error.action for error in errors),
        )
        combined.problems = errors
        combined.args = ("\n\n".join(f"[{n}] {error}" for n, error in enumerate(errors, 1)),)
        return combined


class LineageError(UserError):
    """An artifact was made from other inputs than the ones it is used with."""
