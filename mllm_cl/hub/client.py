"""The Hub's own client with patience: what fails for the moment is tried again, everything else is one clear message."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from mllm_cl.errors import HubError

Result = TypeVar("Result")

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 2.0, 30.0
"""Tries of a whole step, and seconds between them; the client itself tries most requests several times in each."""

LONGEST_ASKED = 300.0
"""Seconds that are waited when the Hub says how long; its limits are counted over five minutes."""

SILENCE = 300.0
"""Seconds without a byte after which a connection counts as lost; the client by itself waits for ever."""

_FOR_THE_MOMENT = (408, 425, 429, 500, 502, 503, 504)
_QUERY = re.compile(r"(https?://[^\s'\"?)]+)\?[^\s'\")]*")

log = logging.getLogger(__name__)


def make_api() -> HfApi:
    """Returns a client; it finds the token (`HF_TOKEN`, `hf auth login`) and the endpoint (`HF_ENDPOINT`) by itself."""
    return HfApi(library_name="mllm_cl")


def require_token() -> None:
    """Refuses to begin without a token.

    Raises:
        HubError: there is none.
    """
    if get_token() is None:
        raise HubError(
            "not logged in to the Hub.",
            expected="an access token that may write",
            fix="`hf auth login`, or set HF_TOKEN in the environment (never in a recipe).",
        )


def patiently(what: str, action: Callable[[], Result]) -> Result:
    """Returns what `action` returns; tries it again after timeouts, lost connections, 429 and 5xx.

    Args:
        what: for messages, such as `creating owner/name`.
        action: must be safe to repeat from its beginning.

    Raises:
        HubError: it failed for good. The message holds neither a token nor the query of a signed address.
    """
    wait = FIRST_WAIT
    with _quiet():
        for attempt in range(1, ATTEMPTS + 1):
            get_session().timeout = SILENCE
            try:
                return action()
            except Exception as error:
                cause = _cause(error)
                if cause is None:
                    raise
                if not _passes(cause) or attempt == ATTEMPTS:
                    # the chain is cut: requests and addresses in it may be signed
                    raise HubError(
                        f"{what}: failed ({describe(cause)}).",
                        expected=f"success within {ATTEMPTS} tries" if _passes(cause) else None,
                        fix=_advice(cause),
                    ) from None
                asked = max(wait, _asked_to_wait(cause))
                log.warning("%s: %s; trying again in %.0f s.", what, describe(cause), asked)
            time.sleep(asked)
            wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError("unreachable")


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository, before anybody is asked.

    Raises:
        HubError: it is not `owner/name`.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        valid = False
    else:
        valid = "/" in repo_id
    if not valid:
        raise HubError(
            f"{repo_id!r}: is not the name of a repository.",
            expected="owner/name, of letters, digits, `-`, `_` and `.`",
            fix="correct the name.",
        )


def _asked_to_wait(error: BaseException) -> float:
    """The seconds that the Hub asks for (`Retry-After`), as far as a person would wait for them; 0 if it does not."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(asked), LONGEST_ASKED) if asked.isdecimal() else 0.0


def describe(error: BaseException) -> str:
    """Returns the first line of an error, and of what a server said the next too, without tokens and signatures."""
    text = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    line = _QUERY.sub(r"\1", " ".join(text[: 2 if text and text[0].endswith(":") else 1]))
    token = get_token()
    return f"{type(error).__name__}: {line.replace(token, '***') if token else line}".removesuffix(": ")


def _cause(error: BaseException | None) -> BaseException | None:
    """The error of the network or the Hub behind an exception; `None` if it is another kind of error."""
    seen = error
    while seen is not None:
        if isinstance(seen, (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)) or _is_transport(seen):
            return seen
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, (LocalEntryNotFoundError, OSError, ValueError, RuntimeError, LookupError)) and _from_client(
        error
    ):
        return error
    return None


def _is_transport(error: BaseException) -> bool:
    """A timeout, a refused or lost connection: whichever HTTP library this version of the client is built on."""
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)


def _from_client(error: BaseException) -> bool:
    """True if the client or a library below it raised it (bad metadata, a failed transfer, a connection pool that was
    closed under one thread because another lost its connection)."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in ("huggingface_hub", "hf_xet", "httpx", "httpx2")


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _FOR_THE_MOMENT
    return _is_transport(error) or isinstance(error, (LocalEntryNotFoundError, RuntimeError))


def _advice(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "ask for access on its page."
    if isinstance(error, RepositoryNotFoundError):
        return "check the name; for a private repository, log in with `hf auth login` or HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return "check the branch."
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "log in with a token that may write there: `hf auth login`, or HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE."
    if isinstance(error, (HFValidationError, ValueError)):
        return "correct what it names."
    return "try the same command again later; what was uploaded is not uploaded twice, and nothing is half published."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the client's log lines away (they show signed addresses), and its bars where no person watches."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    bars = sys.stderr.isatty()
    if not bars:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if not bars:
            enable_progress_bars()
