"""The page of a model's attention: its bytes are the model's weights, its scores the model's, and a
browser shows them without a network.
"""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.data.tokens import end_of_text_id, load_tokenizer
from modern_llm.evaluation.attention import (
    attention_maps, planted_repetition, repetition_gain, without_head,
)
from modern_llm.evaluation.head_film import head_scores, ordinary_tokens
from modern_llm.files import CHECKOUT
from modern_llm.models.saving import load_model
from modern_llm.report.attention_page import attention_page, checkpoints_of
from modern_llm.tests.browser import chromium_page
from modern_llm.tests.test_hub import written

TEXT = "Tom </script> has a hat."


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A page over two checkpoints, both random Llamas as transformers writes them, and their
    folders.
    """
    root = tmp_path_factory.mktemp("page")
    written(root / "tiny")
    shutil.copytree(root / "tiny", root / "other")
    with torch.no_grad():
        model = written(root / "other")
        model.model.layers[0].self_attn.q_proj.weight.mul_(8)
    model.save_pretrained(root / "other")
    done = CliRunner().invoke(main, ["attention-page", str(root / "tiny"), str(root / "other"),
                                     "--to", str(root / "page.html"), "--text", TEXT,
                                     "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0 and "2 checkpoints" in done.output, done.output
    return root / "page.html", [checkpoints_of(root / name)[0][1] for name in ("tiny", "other")]


def held(page: Path) -> dict:
    return json.loads(re.search(r'type="application/json">(.*?)</script>',
                                page.read_text(encoding="utf-8"), re.S)[1])


def test_the_bytes_are_the_weights(pages):
    page, folders = pages
    data = held(page)
    tokenizer = load_tokenizer(folders[0])
    ids = torch.tensor([[end_of_text_id(tokenizer),
                         *tokenizer.encode(TEXT, add_special_tokens=False).ids]])
    t = ids.shape[1]
    rows, columns = np.tril_indices(t)
    for view, folder in zip(data["views"], folders):
        roots = np.frombuffer(base64.b64decode(view["maps"][0]), np.uint8).reshape(-1, len(rows))
        maps = attention_maps(load_model(folder), ids)[:, 0].flatten(0, 1).numpy()
        assert len(maps) == data["layers"] * data["heads"]
        assert np.abs((roots / 255) ** 2 - maps[:, rows, columns]).max() < 0.004
    assert data["views"][0]["maps"] != data["views"][1]["maps"]
    table = pd.read_csv(page.with_suffix(".csv"))
    for view, (name, of_one) in zip(data["views"], table.groupby("checkpoint", sort=False)):
        assert name == view["name"]
        assert [one["lost"] for one in view["scores"]] == pytest.approx(list(of_one.lost), abs=1e-4)
    assert "".join(data["texts"][0]["labels"][1:]) == TEXT


def test_scores_are_what_the_model_loses(pages):
    model = load_model(pages[1][1])
    tokens = ordinary_tokens(load_tokenizer(pages[1][1]))
    table = head_scores(model, tokens, 1, length=6, rows=8)
    planted, control = planted_repetition(tokens, 6, 8, 1)
    whole = repetition_gain(model, planted, control).mean().item()
    with without_head(model, 0, 1):
        less = repetition_gain(model, planted, control).mean().item()
    one = table.loc[(0, 1)]
    assert table.attrs["saved"]["value"] == pytest.approx(whole)
    assert one.lost == pytest.approx(whole - less, abs=1e-6) and one.low <= one.lost <= one.high
    assert len(table) == model.cfg.num_layers * model.cfg.num_heads and (table.n == 8).all()


def test_refusals(pages, tmp_path):
    page, folders = pages
    said = CliRunner().invoke(main, ["attention-page", str(folders[0]), "--to", str(page)])
    assert said.exit_code == 2 and "--force" in said.output
    mine = tmp_path / "mine.csv"  # which the page's table would be called, too
    mine.write_text("a,b\n1,2\n")
    said = CliRunner().invoke(main, ["attention-page", str(folders[0]), "--to",
                                     str(mine.with_suffix(".html"))])
    assert said.exit_code == 2 and f"{mine} is there: --force" in said.output
    said = CliRunner().invoke(main, ["attention-page", str(folders[0]), "--to",
                                     str(tmp_path / "new.csv")])
    assert said.exit_code == 2 and f"name a page, {tmp_path / 'new.html'}" in said.output
    assert mine.read_text() == "a,b\n1,2\n"
    mine.unlink()
    with pytest.raises(ValueError, match="64 at most: use a shorter one"):
        attention_page([("a", folders[0])], tmp_path / "page.html", "a", ["x" * 200])
    assert not list(tmp_path.iterdir())


def test_in_a_browser(pages):
    """From a file, offline: pointing at a square names both tokens and the weight, the slider
    changes it, a phone needs no sideways scrolling.
    """
    page_file, data = pages[0], held(pages[0])
    labels, asked, wrong = data["texts"][0]["labels"], [], []
    n, t, s = len(labels), 5, 2
    where = t * (t + 1) // 2 + s
    with chromium_page() as page:
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(page_file.as_uri())
        for view in (1, 0):
            page.locator("#view").fill(str(view))
            box = page.locator("#map").bounding_box()
            page.mouse.move(box["x"] + (s + 0.5) * box["width"] / n,
                            box["y"] + (t + 0.5) * box["height"] / n)
            weight = (base64.b64decode(data["views"][view]["maps"][0])[where] / 255) ** 2
            assert (page.locator("#pair").inner_text()
                    == f"“{labels[t]}” ({t}) reads “{labels[s]}” ({s}): {weight:.3f}")
            assert data["views"][view]["name"] in page.locator("#name").inner_text()
            assert (page.locator("#scores tr.now td").first.inner_text()
                    == data["views"][view]["name"])
        page.locator("#head").select_option("1")
        assert f"{data['views'][0]['scores'][1]['lost']:.3f}" in page.locator(
            "#scores tr.now").inner_text()
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert wrong == [] and all(url.startswith("file:") for url in asked)


def test_the_published_page_is_of_this_template():
    """Whoever changes the page writes the published one anew."""
    template = (CHECKOUT / "modern_llm" / "report" / "attention_page.html").read_text("utf-8")
    page = (CHECKOUT / "report" / "attention" / "local-smoke.html").read_text("utf-8")
    assert page.replace(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1],
                        "DATA", 1) == template
