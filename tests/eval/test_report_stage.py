"""What the stages leave is what the report reads: a tiny model is measured, the page made from that."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dense2sparse.eval import benchmarks, stages
from dense2sparse.eval.report import write_report
from dense2sparse.eval.report_arithmetic import dense_per_token, operations, sparse_per_token
from dense2sparse.eval.ruler_corpus import PUBLIC_DOMAIN, Corpus

RULER = """
  - {kind: ruler, tasks: [niah_single_1, vt], lengths: [512, 640], samples: 1, top_k: [4, 8]}
"""


@pytest.fixture(scope="module")
def measured(answering, tmp_path_factory, tokenizer, ruler_like_words, works):
    """The context of a run with one RULER stage that has been run."""
    home = tmp_path_factory.mktemp("report-stage")
    answering.build_home(home, answering.lively_model(), tokenizer, stages=RULER)
    ctx = answering.context(home, home / "run")
    templates = {
        family: replace(template, new_tokens=2)
        for family, template in ruler_like_words.templates.items()
    }
    corpus = Corpus(PUBLIC_DOMAIN, replace(ruler_like_words, templates=templates), works)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "read_corpus", lambda name, cache, **wanted: corpus)
        stages.run_ruler(ctx, next(one for one in ctx.recipe.stages if one.kind == "ruler"))
    return ctx


def test_operations_stand_beside_the_scores_of_a_stage_that_measured_no_perplexity(measured):
    path = measured.run_dir / "eval/ruler/stage-0.json"
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    shape = arms["converted_sparse-k4"]["shape"]
    assert arms["original_dense"]["shape"] == {"layers": 2, "query_heads": 4, "head_width": 16}
    index = {"sparse_layers": 1, "index_heads": 2, "index_width": 16, "block_size": 16}
    assert (
        shape
        == arms["converted_oracle-k8"]["shape"]
        == {**arms["original_dense"]["shape"], **index}
    )
    text = write_report(measured.run_dir)["markdown"].read_text(encoding="utf-8")
    dense, sparse = dense_per_token(shape, 640), sparse_per_token(shape, 640, 4)
    share = f"{100 * sparse / dense:.0f} %"
    assert f"| {operations(dense)} | 100 % |" in text
    assert f"| {operations(sparse)} | {share} |" in text
    assert "the data is not NVIDIA's and not every length has all 13 tasks" in text
