"""What `mkdocs.yml` cannot say: README.md is the first page, and links lead to files of the repository as on its own site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINKED = (
    "benchmarks",
    "emim_solo",
    "examples",
    "research",
    "scripts",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
)
"""What pages may link to outside docs/: it is part of the site, under the same name."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that the navigation does not name."""
    assert config.nav is not None
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    config.nav += sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and what is linked to, so that a link to a file that is not there is an error as any other."""
    root = Path(config.docs_dir).parent
    files.append(File.generated(config, "index.md", abs_src_path=str(root / "README.md")))
    for linked in LINKED:
        for path in (root / linked, *sorted((root / linked).rglob("*"))):
            if path.is_file() and path.suffix != ".pyc":
                files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links from the repository's root, and out of docs/, into links within the site. Pictures can be opened: on a phone they are small."""
    assert page.file.abs_src_path is not None
    depth = page.file.src_uri.count("/")
    in_docs = Path(config.docs_dir) in Path(page.file.abs_src_path).parents
    outside = re.escape("../" * (depth + 1)) if in_docs else "docs/"
    markdown = re.sub(r"^!\[([^\]]*)\]\(([^)]+)\)$", r"[![\1](\2)](\2)", markdown, flags=re.MULTILINE)
    return re.sub(rf'(\]\(|(?:src|href)="){outside}', rf"\1{'../' * depth}", markdown)
