"""
Fetch the libraries of the page from npm into services/edge/page/vendor, and axe-core for its tests.
They are committed, so only who changes a version runs this: `just vendor`. It needs npm.

`--check` only reports whether the committed files are those that vendor.json lists.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "services/edge/page/vendor"
TESTS = ROOT / "tests/page/vendor"
LIST = "vendor.json"


class Package(NamedTuple):
    """
    A version of a package, its `integrity` as npm publishes it, and `files`: those to take by their
    names here. `*` takes all files of a folder that end like the name.
    """

    name: str
    version: str
    licence: str
    integrity: str
    files: dict[str, str]


PAGE_PACKAGES = (
    Package(
        "htm",
        "3.1.1",
        "Apache-2.0",
        "sha512-983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/"
        "85mtfdnDmTFoNKcg5DGAvxNQ==",
        {"preact.js": "preact/standalone.module.js", "licences/htm.txt": "LICENSE"},
    ),
    Package(  # which htm/preact/standalone contains
        "preact",
        "10.13.2",
        "MIT",
        "sha512-q44QFLhOhty2Bd0Y46fnYW0gD/cbVM9dUVtNTDKPcdXSMA7jfY+Jpd6rk3GB0lcQss0z5s/"
        "6CmVP0Z/hV+g6pw==",
        {"licences/preact.txt": "LICENSE"},
    ),
    Package(
        "marked",
        "18.2.1",
        "MIT",
        "sha512-ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/"
        "cI6p8z57FxliACboTruMA==",
        {"marked.js": "lib/marked.esm.js", "licences/marked.txt": "LICENSE"},
    ),
    Package(
        "dompurify",
        "3.5.0",
        "MPL-2.0 OR Apache-2.0",
        "sha512-LYC0ZkE8P1V42JsRYTwMdme/2ET8SpOc5AA2eOFjP/"
        "IadvRd2fwiT4TVz5vkfy0XUx12aS2UaRkTnfVPNOv9vw==",
        {"purify.js": "dist/purify.es.mjs", "licences/dompurify.txt": "LICENSE"},
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        "sha512-KvOKXODaiFmId9xaq3xc5xCL66wVLUuOngDbO9B/kewbFTqdGbn2nJxNhN3H5R1cgDTVj6R8vH0zgiNDEGjpDw==",
        {"highlight.js": "es/highlight.min.js", "licences/highlight.txt": "LICENSE"},
    ),
    Package(
        "katex",
        "0.19.1",
        "MIT",
        "sha512-jG8uKntjSEcm2EpQOh0XturpPuuC9r3Sq5HLHdsFdWZT27E672SF19QEi+of0/"
        "YeOy15lDgRhKvr5614uRrEfA==",
        {
            "katex/katex.js": "dist/katex.mjs",
            "katex/katex.css": "dist/katex-swap.min.css",
            "katex/fonts/*.woff2": "dist/fonts/",
            "licences/katex.txt": "LICENSE",
        },
    ),
    Package(
        "uplot",
        "1.6.32",
        "MIT",
        "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/"
        "ep3tOkyTxpiQIw==",
        {
            "uplot/uplot.js": "dist/uPlot.esm.js",
            "uplot/uplot.css": "dist/uPlot.min.css",
            "licences/uplot.txt": "LICENSE",
        },
    ),
)
TEST_PACKAGES = (
    Package(
        "axe-core",
        "4.14.1",
        "MPL-2.0",
        "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
        {"axe.js": "axe.min.js", "licences/axe.txt": "LICENSE"},
    ),
)


def fetch(package: Package, folder: Path) -> dict[str, str]:
    """Write the package's files. Return the SHA-256 of each. Raises SystemExit."""
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        subprocess.run(command, check=True, cwd=temporary, stdout=subprocess.DEVNULL)
        archive = next(Path(temporary).glob("*.tgz"))
        digest = hashlib.sha512(archive.read_bytes()).digest()
        if package.integrity != f"sha512-{base64.b64encode(digest).decode()}":
            raise SystemExit(f"{package.name} {package.version} is not what deploy/vendor.py pins.")
        with tarfile.open(archive) as tar:
            return dict(_extract(tar, package, folder))


def _extract(tar: tarfile.TarFile, package: Package, folder: Path) -> Iterator[tuple[str, str]]:
    for target, source in package.files.items():
        parent, _, ending = target.partition("*")
        for member in tar.getnames():
            path = member.removeprefix("package/")
            if ending and path.startswith(source) and path.endswith(ending):
                name = parent + path.removeprefix(source)
            elif path == source:
                name = target
            else:
                continue
            file = tar.extractfile(member)
            assert file is not None, "a file"
            content = file.read()
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            yield name, hashlib.sha256(content).hexdigest()


def check(folder: Path) -> list[str]:
    """Return the files that differ from the folder's list, are missing, or are not on it."""
    packages = json.loads((folder / LIST).read_text())
    listed = {name: digest for each in packages.values() for name, digest in each["files"].items()}
    there = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LIST
    }
    names = listed.keys() | there.keys()
    return sorted(name for name in names if listed.get(name) != there.get(name))


def main() -> int:
    for folder, packages in ((PAGE, PAGE_PACKAGES), (TESTS, TEST_PACKAGES)):
        if "--check" not in sys.argv:
            found = {
                each.name: {
                    "version": each.version,
                    "licence": each.licence,
                    "files": fetch(each, folder),
                }
                for each in packages
            }
            (folder / LIST).write_text(json.dumps(found, indent=2) + "\n")
        if changed := check(folder):
            print(f"{folder}: not as vendored: {', '.join(changed)}. Run `just vendor`.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
