"""HTTP requests that are repeated while that may help: exponential backoff, full jitter, Retry-After.

The Retry of urllib3, which comes with requests, sees broken connections and status codes alone. Here an attempt is a
function, so that a page that came short or a file with a wrong checksum is asked for again, too.
"""

import email.utils
import itertools
import math
import random
import sys
import time
from datetime import UTC, datetime

import requests

TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte
BACKOFF, BACKOFF_CAP = 1.0, 60.0  # seconds: after the n-th failure, wait a random time up to BACKOFF * 2**(n-1)
NOTICEABLE = 5.0  # seconds: a longer wait is announced on stderr


class Failed(Exception):
    """An attempt failed in a way that may pass. answer: the error that the server sent, if it sent one."""

    def __init__(self, reason, answer=None):
        super().__init__(reason)
        self.answer = answer


class Refused(Failed):
    """The server refuses for good: asking again has no use."""


def get(url, session=requests, **arguments):
    """The answer to a GET request, when its status is good. arguments: those of requests.get.

    Raises Refused for an error status, Failed where it may pass (408, 429, 5xx without 501), and
    requests.RequestException.
    """
    answer = session.get(url, timeout=TIMEOUT, **arguments)
    if answer.ok:
        return answer
    reason = f"HTTP {answer.status_code} {answer.headers.get('X-Error-Code', '')} {answer.text[:200]}"
    passing = answer.status_code in (408, 429) or answer.status_code >= 500 and answer.status_code != 501
    raise (Failed if passing else Refused)(" ".join(reason.split()), answer)


def repeat(attempt, name, tries=math.inf, seconds=math.inf):
    """What attempt() returns. It is called again after each Failed and requests.RequestException.

    name: what is fetched, for messages. Raises Failed when `tries` attempts have failed, or when the next one would
    begin more than `seconds` after the first; Refused at once.
    """
    begun = time.monotonic()
    for count in itertools.count(1):
        try:
            return attempt()
        except Refused:
            raise
        except Failed as error:
            failure = error
        except requests.RequestException as error:
            failure = Failed(type(error).__name__)  # its text is a page of addresses and object names
        asked = 0.0 if failure.answer is None else retry_after(failure.answer.headers.get("Retry-After"))
        wait = asked + random.uniform(0, min(BACKOFF_CAP, BACKOFF * 2 ** min(count - 1, 30)))
        if count >= tries or time.monotonic() + wait > begun + seconds:
            raise failure
        if wait > NOTICEABLE:
            print(f"{name}: {str(failure)[:90]}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait)


def retry_after(value):
    """Seconds to wait from a Retry-After header: seconds, an HTTP date, or (absent or unreadable) none."""
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
