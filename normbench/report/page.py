"""A report as one HTML page: nothing outside it, every name escaped, one inline script that sorts tables."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from normbench.report.drawing import Drawing
from normbench.report.sections import PROSE, Report

HERE = Path(__file__).parent


@cache
def environment() -> Environment:
    """Templates whose every value is escaped, unless it is marked."""
    made = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    made.filters["svg"] = Markup  # drawings are made by matplotlib, which escapes their texts
    made.filters["breakable"] = breakable
    made.tests["drawing"] = lambda block: isinstance(block, Drawing)
    return made


def breakable(text: str) -> Markup:
    """A name that may be broken behind its dots and underscores, rather than anywhere."""
    return Markup(re.sub(r"(?<=[._/=])(?=\w)", "<wbr>", str(escape(text))))


def html_of(report: Report, reload_s: float | None = None) -> str:
    """The page; with `reload_s` it loads itself anew every so many seconds."""
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment().get_template("page.html")
    return template.render(report=report, reload_s=reload_s, style=Markup((HERE / "page.css").read_text()),
                           script=Markup(script), digest=digest, prose=PROSE)  # fmt: skip
