"""The URL of Redis or Valkey: whether it is one, its TLS options, and how it is shown.

    redis://[[user]:password@]host[:port][/number]
    rediss://...?ssl_cert_reqs=required&ssl_ca_certs=/etc/ca.pem
    sentinel://host[:port][/number];sentinel://...

Celery and redis-py read such a URL each in its own way; what this lets through both understand.
"""

from collections.abc import Iterator
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from jobs.domain.errors import InvalidInput

SCHEMES = ("redis", "rediss", "sentinel")

_RULES = ("required", "optional", "none")
_TLS_OPTIONS = frozenset(
    {
        "ssl_cert_reqs",
        "ssl_check_hostname",
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_ca_data",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_password",
        "ssl_ciphers",
    }
)


def check_url(url: str) -> None:
    """Check that every client of ours can use this URL; no message shows its password.

    Raises:
        InvalidInput: one cannot.
    """
    try:
        parts = list(_split(url))
        _ = [one.port for one in parts]  # reading it is what checks it
    except ValueError:
        raise _refuse(
            "broker.url is no URL: what stands for its host or its port is none. Signs of a "
            "password such as / and # are written %2F and %23."
        ) from None
    for one in parts:
        if one.scheme not in SCHEMES:
            raise _refuse(
                f"broker.url begins with {one.scheme or 'no scheme'!r}; it has to be one of "
                f"{', '.join(f'{known}://' for known in SCHEMES)}."
            )
        if not (one.path.strip("/") or "0").isdecimal():
            hint = " The master's name is broker.sentinel_master." * (one.scheme == "sentinel")
            raise _refuse(
                f"broker.url ends with the number of a database, such as /0, or nothing.{hint}"
            )
        for name, _ in parse_qsl(one.query, keep_blank_values=True):
            if one.scheme != "rediss" or name not in _TLS_OPTIONS:
                raise _refuse(
                    "broker.url has an option that it cannot have: behind its ? may stand, with "
                    f"rediss:// only, {', '.join(sorted(_TLS_OPTIONS))}."
                )
    tls_options(url)


def _split(url: str) -> Iterator[SplitResult]:
    """Yield the parts of each server's URL; several are sentinels.

    Raises:
        ValueError: one is no URL.
    """
    many = url.split(";") if url.startswith("sentinel://") else [url]
    return (
        urlsplit(one if "://" in one or len(many) == 1 else f"sentinel://{one}") for one in many
    )


def _refuse(message: str) -> InvalidInput:
    return InvalidInput(message, param="broker.url")


def tls_options(url: str) -> dict[str, str | bool] | None:
    """Return the options of TLS in the words of redis-py, or None where there is no TLS.

    Celery's CERT_REQUIRED is `required`. Without a word certificates are checked.

    Raises:
        InvalidInput: one is none that is known.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return None
    given: dict[str, str] = dict(parse_qsl(parts.query))
    rule = given.pop("ssl_cert_reqs", "required")
    word = rule.lower().removeprefix("cert_")
    if word not in _RULES:
        raise _refuse(f"ssl_cert_reqs in broker.url is {rule!r}; it is required, optional or none.")
    named = given.pop("ssl_check_hostname", "true").lower() not in {"false", "0", "no"}
    return {**given, "ssl_cert_reqs": word, "ssl_check_hostname": named and word != "none"}


def without_options(url: str) -> str:
    """Return the URL without what stands behind its question mark."""
    return urlunsplit(urlsplit(url)._replace(query="")) if "?" in url else url


def for_redis_py(url: str) -> str:
    """Return the URL with its options of TLS in the words of redis-py.

    Raises:
        InvalidInput: one is none that is known.
    """
    options = tls_options(url)
    if options is None:
        return url
    return f"{without_options(url)}?{urlencode({key: str(options[key]) for key in options})}"


def shown_url(url: str) -> str:
    """Return scheme, host, port and database of a URL: no user, no password, no options."""
    try:
        return ";".join(_shown(one) for one in _split(url))
    except ValueError:
        return f"{url.partition('://')[0] if '://' in url else ''}://..."


def _shown(parts: SplitResult) -> str:
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port is not None else ""
    number = parts.path if parts.path.strip("/").isdecimal() else ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{number}"
