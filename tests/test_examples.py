"""The examples in their short form: each runs, and beats the baseline that it names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Main = Callable[[list[str]], dict[str, float]]

pytestmark = pytest.mark.slow


def example(name: str) -> Main:
    """`main` of an example, which takes the command line's arguments and returns its metrics."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Main = module.main
    return main


def printed_losses(text: str) -> list[list[float]]:
    """The columns of the rows "step 3 | loss | loss" that examples/distributed.py prints."""
    rows = (line.split("|")[1:] for line in text.splitlines() if line.startswith("step"))
    return [[float(loss) for loss in row] for row in rows]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_distributed(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes print the losses of one."""
    pytest.importorskip("sklearn")
    metrics = example("distributed")(["--quick"])
    assert metrics["last loss"] < 0.9 * metrics["first loss"]
    assert metrics["accuracy"] > 2 * metrics["accuracy of the most frequent digit"]
    alone = printed_losses(capsys.readouterr().out)

    script = [str(EXAMPLES / "distributed.py"), "--quick", "--strategy", strategy]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, *torchrun, "--nproc-per-node", "2", *script]
    # The machine's name may lead to no address.
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.terminate()  # it then ends the processes that it started
            raise
    assert process.returncode == 0, errors
    both = printed_losses(output)
    assert len(both) == len(alone) == 10
    for (expected,), (one, two) in zip(alone, both, strict=True):
        assert one == pytest.approx(expected, abs=2e-5)
        assert two == pytest.approx(expected, abs=2e-5)


def test_image_captioning() -> None:
    pytest.importorskip("sklearn")
    metrics = example("image_captioning")(["--quick"])
    assert metrics["recurrent: words"] > 3 * metrics["most frequent: words"]
    assert metrics["recurrent: letters"] > 1.5 * metrics["most frequent: letters"]
    assert metrics["classifier: words"] > 3 * metrics["most frequent: words"]


def test_video_labelling() -> None:
    pytest.importorskip("sklearn")
    metrics = example("video_labelling")(["--quick"])
    assert metrics["online"] > 1.1 * metrics["frame by frame"]
    assert metrics["offline"] > 1.2 * metrics["frame by frame"]
    assert metrics["last 12 frames"] > 1.2 * metrics["frame by frame"]
    assert metrics["frame by frame"] > 1.5 * metrics["most frequent"]


def test_recurrent_policy() -> None:
    pytest.importorskip("gymnasium")
    returns = example("recurrent_policy")(["--quick"])
    assert returns["recurrent"] > 1.2 * returns["without memory"]
    assert returns["two observations"] > 2 * returns["without memory"]
    assert returns["without memory"] > 1.3 * returns["random"]


def test_convert_model() -> None:
    pytest.importorskip("bi_lstm_crf")
    pytest.importorskip("snownlp")
    metrics = example("convert_model")(["--quick"])
    for name in ("scores", "loss", "gradients"):
        assert metrics[f"difference of {name}"] < 1e-4
    assert metrics["F1, converted"] == pytest.approx(metrics["F1, torch.nn"], abs=5e-3)
    assert metrics["F1, converted"] > 1.15 * metrics["F1, most frequent tag"]


def test_document_classification() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("snownlp")
    metrics = example("document_classification")(["--quick"])
    assert metrics["GRU"] > metrics["majority"] + 0.08
    assert metrics["logistic"] > metrics["majority"] + 0.1
    assert metrics["naive Bayes"] > metrics["majority"] + 0.08


def test_language_model() -> None:
    bits = example("language_model")(["--quick", "--length", "20"])
    assert bits["LSTM"] < 0.9 * bits["unigram"]
    assert bits["n-gram"] < bits["unigram"] < bits["uniform"]


def test_forecasting() -> None:
    pytest.importorskip("statsmodels")
    rmse = example("forecasting")(["--quick"])
    assert rmse["gru"] < 0.93 * rmse["seasonal_naive"]
    assert rmse["gru"] < 0.7 * rmse["persistence"]


def test_streaming() -> None:
    pytest.importorskip("matplotlib")
    metrics = example("streaming")(["--quick"])
    for way in ("frozen step", "step", "torch.nn step"):  # of voltages from -70 to 4 mV
        assert metrics[f"{way}: difference"] < 1e-3
    assert metrics["gru"] < 0.8 * metrics["persistence"]


def test_vanishing_gradients(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "flow.png"
    metrics = example("vanishing_gradients")(["--quick", "--plot", str(plot)])

    def ratio(variant: str) -> float:
        return metrics[f"{variant}: ratio"]

    assert ratio("RNN") < 1e-3
    assert ratio("RNN") < 0.1 * ratio("RNN orthogonal")
    assert ratio("RNN") < 0.1 * ratio("RNN ReLU, identity")
    assert ratio("LSTM") < 0.1 * ratio("LSTM forget bias 1")
    assert ratio("LSTM forget bias 1") < 0.5 * ratio("LSTM forget bias 1, gate slope 2")
    assert ratio("GRU") < 0.1 * ratio("GRU chrono")
    exploding, clipped = "no clipping", "each step clipped"
    assert ratio(f"RNN orthogonal x 1.5, {clipped}") < 1
    assert ratio(f"RNN orthogonal x 1.5, {exploding}") > 1
    assert metrics["GRU chrono: mse"] < 0.5 * metrics["baseline"]
    assert plot.stat().st_size > 0
