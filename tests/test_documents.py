"""What README.md, docs/ and CITATION.cff say: links, pictures, numbers, names of tests, facts of models and songs."""

import json
import re
from decimal import ROUND_HALF_UP, Decimal

import matplotlib.image
import pytest
import yaml
from test_project import ROOT

import args
import pretrained

README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]


def prose(path):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(path):
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(path))


def anchors(path):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+(/[\w./%+-]*)?(#[\w-]+)?", link), link
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}"


def test_pictures_are_whole_and_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")}
    there = set(ROOT.glob("docs/*/*.png"))
    assert there and shown == there
    for path in there:
        picture = matplotlib.image.imread(path)[..., :3]
        assert min(picture.shape[:2]) > 200 and picture.std() > 0.01, path


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README) if "://" not in link}
    assert set(PAGES) - {README} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tests_that_are_named_exist(page):
    for names in re.findall(r"^.*`tests/\w+\.py.*$", page.read_text(), re.MULTILINE):
        file = None
        for path, test in re.findall(r"`(tests/\w+\.py)?(?:::(\w+))?`", names):
            file = ROOT / path if path else file
            assert not path or file.exists(), f"{page.name} names {path}"
            assert not test or f"def {test}(" in file.read_text(), f"{page.name} names {test}"


def test_every_row_beside_the_others_has_its_proof():
    section = README.read_text().partition("## Beside the others")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 8
    for row in rows:
        assert len(row) == 6
        assert re.search(r"`tests/\w+\.py::\w+`|\]\(docs/\w+\.md#[\w-]+\)", row[-1]), row[0]


# -------------------------------------------------------------------------------------------- numbers


def measured(title, row):
    """Cells of the first row that begins so, in a section of docs/performance.md."""
    section = (ROOT / "docs" / "performance.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def rounded(cell):
    return Decimal(cell).quantize(Decimal("0.01"), ROUND_HALF_UP)


def test_the_readme_and_the_questions_quote_what_was_measured():
    readme, questions = (re.sub(r"\s+", " ", path.read_text()) for path in (README, ROOT / "docs" / "faq.md"))
    _, _, time, own, _, memory = measured("Training step", "batch 16")
    minute, three = measured("Separation", "60 s"), measured("Separation", "180 s")
    assert f"takes {rounded(time)} of torch's time at batch 16 and {rounded(memory)} of its memory" in readme
    assert f"separation {rounded(three[2])} to {rounded(minute[2])} of its time" in readme
    assert f"| 1 / {rounded(time)} |" in readme
    assert 55 < 1 / float(measured("Native NNabla", "step")[2]) < 65, "some sixty times"
    for what, memory in (("batch 16", own), ("60 s into four stems", minute[3]), ("180 s", three[3])):
        assert f"{what} | {memory} |" in questions


# ---------------------------------------------------------------------------------------------- cards


def card(name):
    text = (ROOT / "docs" / "models.md").read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([\w ]+?) \| (.+) \|$", text, re.MULTILINE))


@pytest.mark.parametrize("name", pretrained.MODELS)
def test_cards_of_models(name):
    says, model = card(name), pretrained.MODELS[name]
    assert says["targets"] == ", ".join(model.files)
    channels = {1: "mono", 2: "stereo"}[model.config["nb_channels"]]
    stft = f"STFT of {model.config['nfft']} samples every {model.config['nhop']}"
    assert says["audio"].startswith(f"{model.config['sample_rate']} Hz, {channels}; {stft}; hidden size ")
    assert f"({model.url.removesuffix('/files')})" in says["weights"]
    terms = re.search(r"non-commercial use only \((.*)\)", model.note)
    assert ("non-commercial" in says["licence"]) == bool(terms)
    assert not terms or terms[1] in says["licence"]
    published = json.loads((ROOT / "docs" / "published_scores.json").read_text())["models"]
    scores = next((entry["scores"] for entry in published if entry["name"] == name), None)
    if scores:
        assert says["SDR"] == ", ".join(f"{target} {scores[target]['SDR']:.2f}" for target in model.files)
    else:
        assert says["scores"].startswith("none")


def test_the_card_of_the_songs():
    text = (ROOT / "docs" / "songs.md").read_text()
    defaults = args.synthesize_parser().parse_args(["songs"])
    assert f"| {defaults.train}, {defaults.valid}, {defaults.test} |" in text
    assert f"| `--duration`: seconds of each | {defaults.duration:g} |" in text
    assert f"(`--seed`, {defaults.seed})" in text


def test_the_citation_has_the_fields_of_its_format():
    """What the schema of the Citation File Format 1.2.0 asks for."""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cff.keys()
    assert cff["license"] == (ROOT / "LICENSE").read_text().split()[0] == "MIT"
    entries = [cff["preferred-citation"], *cff["references"]]
    for entry in entries:
        assert {"type", "title", "authors"} <= entry.keys() and isinstance(entry["year"], int)
        assert entry["type"] in {"article", "software", "conference-paper", "data"}
        assert all({"family-names", "given-names"} == author.keys() for author in entry["authors"])
        assert (
            re.fullmatch(r"10\.\d{4,}/\S+", entry["doi"]) if "doi" in entry else {"url", "collection-title"} & {*entry}
        )
    cited = " ".join(entry["title"] for entry in entries)
    assert all(name in cited for name in ("Open-Unmix", "Bridging Networks", "norbert", "MUSDB18"))
    assert cff["preferred-citation"]["doi"] in README.read_text()
