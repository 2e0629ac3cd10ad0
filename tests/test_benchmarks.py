"""What the programs of benchmarks/ share: parts of a page, intervals."""

import sys
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import extensions
import report


def test_parts_of_a_page_are_written_one_at_a_time(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Old\n\n| a |\n")  # without parts: compare.py's
    report.write_part(page, "extensions.py", "## New\n\n{text} \\1\n")
    assert page.read_text() == "# Old\n\n| a |\n\n<!-- extensions.py -->\n\n## New\n\n{text} \\1\n"
    report.write_part(page, "compare.py", "# Newer\n")
    report.write_part(page, "other.py", "## Other\n")
    report.write_part(page, "extensions.py", "## Newest\n\n")
    expected = "# Newer\n\n<!-- extensions.py -->\n\n## Newest\n\n<!-- other.py -->\n\n## Other\n"
    assert page.read_text() == expected
    report.write_part(page, "other.py", "## Other\n")
    assert page.read_text() == expected
    for order in (("extensions.py", "compare.py"), ("compare.py", "extensions.py")):
        page.unlink()
        for writer in order:
            report.write_part(page, writer, writer)
        assert page.read_text() == "compare.py\n\n<!-- extensions.py -->\n\nextensions.py\n"


def test_intervals_are_students():
    rng = np.random.default_rng(0)
    for n in (2, 5, 30):
        a, b = rng.normal(3, 1, (2, n))
        mean, reach = extensions.interval(list(a - b))
        low, high = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        np.testing.assert_allclose((mean - reach, mean + reach), (low, high))
