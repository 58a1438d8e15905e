"""
The chat page: static files, read once. Their URLs contain a digest of all of them, so that browsers
keep them until one changes.
"""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from litestar import Response
from litestar.params import FromPath

from services.contract.errors import ServiceError
from services.edge.compression import accepts_gzip
from services.edge.errors import AnyRequest
from services.edge.parameters import get

FOLDER = Path(__file__).with_name("page")
INDEX = "index.html"
DIGEST = b"{digest}"
"""In the index, stands for the digest."""
TEXT_TYPES = {  # Litestar adds the charset
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".webmanifest": "application/manifest+json",
}
MEDIA_TYPES = TEXT_TYPES | {".png": "image/png", ".woff2": "font/woff2"}

# Only scripts, styles and requests of this server, no inline script or style, and no HTML from
# strings but what DOMPurify made: whatever an answer contains, none of it runs or reports home
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "manifest-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
FOREVER = "public, max-age=31536000, immutable"
ALWAYS_ASK = "no-cache"


@dataclass(frozen=True)
class PageFile:
    """`zipped` is the content in gzip; None if it is not smaller in it."""

    media_type: str
    content: bytes
    zipped: bytes | None
    etag: str


@dataclass(frozen=True)
class Page:
    index: PageFile
    files: dict[str, PageFile]  # by path within the folder
    digest: str

    def respond_index(self, request: AnyRequest) -> Response[bytes]:
        headers = {
            "Cache-Control": ALWAYS_ASK,
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Vary": "Accept, Accept-Encoding",
        }
        return _respond(request, self.index, headers)

    def respond_file(self, request: AnyRequest, digest: str, path: str) -> Response[bytes]:
        """
        Return a file. One of another digest is asked for by a page that another edge sent, during
        an update: it gets the file as it is here, once. Raises ServiceError(not_found).
        """
        file = self.files.get(path)
        if file is None:
            raise ServiceError("not_found", f"The page has no file {path[:100]!r}: load / again.")
        caching = FOREVER if digest == self.digest else ALWAYS_ASK
        return _respond(request, file, {"Cache-Control": caching, "Vary": "Accept-Encoding"})


@cache
def load_page() -> Page:
    """Read the folder. Raises KeyError for a file of an unknown type."""
    contents = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in sorted(FOLDER.rglob("*"))
        if path.is_file()
    }
    digest = hashlib.sha256(
        b"".join(
            hashlib.sha256(part).digest() for each in contents.items() for part in _parts(each)
        )
    ).hexdigest()[:16]
    index = contents.pop(INDEX).replace(DIGEST, digest.encode())
    files = {path: _file(path, content) for path, content in contents.items()}
    return Page(_file(INDEX, index), files, digest)


@get("/page/{digest:str}/{name:path}", sync_to_thread=False)
def page_file(request: AnyRequest, digest: FromPath[str], name: FromPath[str]) -> Response[bytes]:
    """Return a file of the page. It needs no key: a browser sends none for scripts and styles."""
    return load_page().respond_file(request, digest, name.removeprefix("/"))


def _parts(named: tuple[str, bytes]) -> tuple[bytes, bytes]:
    name, content = named
    return name.encode(), content


def _file(path: str, content: bytes) -> PageFile:
    suffix = Path(path).suffix
    zipped = gzip.compress(content, mtime=0) if suffix in TEXT_TYPES else content
    return PageFile(
        MEDIA_TYPES[suffix],
        content,
        zipped if len(zipped) < len(content) else None,
        hashlib.sha256(content).hexdigest()[:16],
    )


def _respond(request: AnyRequest, file: PageFile, headers: dict[str, str]) -> Response[bytes]:
    """Respond with the file, in gzip if the client accepts it, or with 304 if the client has it."""
    is_zipped = file.zipped is not None and accepts_gzip(request.headers)
    etag = f'"{file.etag}-gzip"' if is_zipped else f'"{file.etag}"'
    headers = {**headers, "ETag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(b"", status_code=304, headers=headers)
    if is_zipped:
        headers["Content-Encoding"] = "gzip"
    content = file.zipped if is_zipped and file.zipped else file.content
    return Response(content, media_type=file.media_type, headers=headers)
