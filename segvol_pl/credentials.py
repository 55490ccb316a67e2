"""Credentials in the names of places, as `https://user:secret@host/folder`: masked wherever a name is written.

`masked` takes any text, so that what a client library says of a URL is covered too. What reads the place is given its
true name. A masked name cannot be read: `is_masked` recognises one, to request the true one.
"""

from __future__ import annotations

import re

MASK = "***"

_USER = re.compile(r"(:/{1,2}[^/\s:@'\"?#]*:)[^/\s@'\"]*@")
"""Between a URL's scheme and host, where the password is. A `Path` has one slash after the scheme."""
_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:signature|token|key|secret|password|credential)[\w.-]*|sig)=)[^&\s'\"#]+", re.IGNORECASE
)
"""What a signed URL of S3, Google, Azure or CloudFront, or a server with tokens, has in its query."""
_MASKED = re.compile(r":\*{3}@|[?&;][\w.-]+=\*{3}")


def masked(text: str) -> str:
    """The text, `***` in place of every password, token, key and signature of its URLs."""
    return _QUERY.sub(rf"\g<1>{MASK}", _USER.sub(rf"\g<1>{MASK}@", text))


def is_masked(place: str) -> bool:
    """Whether credentials of the place have been masked."""
    return _MASKED.search(place) is not None
