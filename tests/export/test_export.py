"""Graphs of a backbone without weights, in every format; of the built-in one as ONNX."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image

from apt_ray.cli.main import main
from apt_ray.config import FitSettings
from apt_ray.data.folders import Category
from apt_ray.detection.detector import Detector, probe_image
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import ExportError, ImageError, SettingsError, WriteError
from apt_ray.export.exported import ExportedDetector
from apt_ray.export.exporting import Export, export_detector
from apt_ray.export.header import KEY, ExportHeader, Format
from apt_ray.export.writers import SUFFIXES
from apt_ray.features.clip import FrozenCLIP
from apt_ray.images import read_image
from apt_ray.prompts.fit import fit
from tests.fakes import FakeBackbone

FORMATS = tuple(SUFFIXES)


@pytest.fixture(scope="module")
def images(category: Category) -> list[Image.Image]:
    return [read_image(image.path) for image in category.test[:3]]


@pytest.fixture(scope="module")
def detector(category: Category) -> Detector:
    """Of a backbone whose features are known, with a region of interest."""
    backbone = FakeBackbone(patches=8)
    settings = FitSettings(steps=2, cls_weight=0.0)
    prompt_set = fit("washer", category.support_set(2, seed=0), settings, backbone=backbone)
    region_HW = np.ones((8, 8), np.bool_)
    region_HW[:2] = False
    return Detector(backbone, prompt_set, region_of_interest=region_HW)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, detector: Detector) -> tuple[Format, Export]:
    return request.param, export_detector(detector, request.param)


def _agree(detector: Detector, graph: ExportedDetector, images: list[Image.Image]) -> None:
    for ours, theirs in zip(detector.inspect(images), graph.inspect(images), strict=True):
        assert theirs.anomaly_score == pytest.approx(ours.anomaly_score, abs=1e-4)
        assert theirs.anomaly_map == pytest.approx(ours.anomaly_map, abs=1e-3)
        assert theirs.anomaly_map.shape == ours.anomaly_map.shape
        assert (theirs.threshold, theirs.p_value) == (ours.threshold, ours.p_value)
        assert theirs.is_anomalous == ours.is_anomalous
        assert len(theirs.regions) == len(ours.regions)


def test_a_graph_says_what_its_detector_says(
    exported: tuple[Format, Export], detector: Detector, images: list[Image.Image], tmp_path: Path
) -> None:
    kind, made = exported
    assert made.checked == 3, "the test image and two support images"
    assert made.difference <= 1e-4
    path = made.save(tmp_path / "new")
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(
        f"washer{suffix}" for suffix in SUFFIXES[kind]
    )
    graph = ExportedDetector.load(path, threads=1)
    assert (graph.category, graph.reading) == (detector.category, detector.reading)
    assert graph.header.provenance == detector.prompt_set.provenance
    assert graph.header.counted_share == detector.counted_share == 0.75
    _agree(detector, graph, images)
    _agree(detector, graph, images[:1])
    top_HW = graph.inspect(images)[0].anomaly_map[: images[0].height // 5]
    assert not top_HW.any(), "the region of interest is in the graph"


def test_the_threshold_is_in_the_graph_itself(detector: Detector) -> None:
    """To the last bit: a score is above it in the graph exactly if it is for the detector."""
    graph = ExportedDetector("torchscript", export_detector(detector, "torchscript").files)
    pixels = graph.pixels([probe_image((40, 30))])
    _, (score,), _ = graph.run(pixels)
    threshold = detector.prompt_set.threshold
    region_HW = np.ones((8, 8), np.bool_)
    region_HW[:2] = False
    # Between the score and the next lower float32: neither of the two.
    for value, rejects in ((float(score), False), (np.nextafter(float(score), 0), True)):
        moved = threshold.model_copy(update={"value": value})
        provenance = detector.prompt_set.provenance.model_copy(update={"threshold": moved})
        prompt_set = replace(detector.prompt_set, provenance=provenance)
        other = Detector(detector.backbone, prompt_set, region_of_interest=region_HW)
        again = ExportedDetector("torchscript", export_detector(other, "torchscript").files)
        _, same, verdicts = again.run(pixels)
        assert same[0] == score
        assert bool(verdicts[0]) is rejects


@pytest.mark.parametrize("kind", ["openvino", "torchscript"])
def test_a_graph_of_frames_resizes_them_as_pillow_does(
    kind: Format, detector: Detector, images: list[Image.Image]
) -> None:
    made = export_detector(detector, kind, frame=(57, 20), batch=2, images=images)
    graph = ExportedDetector(kind, made.files)
    header = graph.header
    assert (header.width, header.height, header.batch) == (57, 20, 2)
    assert "resized inside" in header.preprocessing
    frames = [image.resize((57, 20)) for image in images]
    _agree(detector, graph, frames)
    with pytest.raises(ImageError, match=r"640 x 480 .* frames of 57 x 20.*--size 640x480"):
        graph.inspect([Image.new("RGB", (640, 480))])


def test_other_programs_find_the_header_in_the_file(
    exported: tuple[Format, Export], detector: Detector, tmp_path: Path
) -> None:
    kind, made = exported
    path = made.save(tmp_path)
    if kind == "onnx":
        model = onnx.load(path)
        onnx.checker.check_model(model)
        (entry,) = model.metadata_props
        assert entry.key == KEY
        text = entry.value
        assert str(Path.cwd()) not in str(model), "no paths of this machine"
    elif kind == "openvino":
        text = str(openvino.Core().read_model(path).get_rt_info([KEY]).astype(str))
    else:
        said = {KEY: ""}
        with pytest.warns(DeprecationWarning, match="torch.jit.load"):
            torch.jit.load(path, _extra_files=said)
        text = said[KEY].decode() if isinstance(said[KEY], bytes) else said[KEY]
    header = json.loads(text)
    assert header["provenance"]["threshold"]["value"] == detector.prompt_set.threshold.value
    assert header["provenance"]["threshold"]["scores"]
    assert header["provenance"]["fingerprint"] == detector.backbone.fingerprint
    assert "RGB" in header["pixels"]
    assert "bicubic" in header["preprocessing"]


def test_a_graph_that_scores_otherwise_is_refused(detector: Detector) -> None:
    """Here because what is exported is not the detector that it is held against."""

    class Drifting(FakeBackbone):
        def encode_images(self, pixels_B3HW: torch.Tensor):  # type: ignore[no-untyped-def]
            if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
                pixels_B3HW = pixels_B3HW.flip(1)
            return super().encode_images(pixels_B3HW)

    drifting = Detector(Drifting(patches=8), detector.prompt_set)
    with pytest.raises(ExportError, match=r"otherwise than the detector, more than the 0\.0001"):
        export_detector(drifting, "torchscript")


def test_a_model_that_no_exporter_can_read_is_named(detector: Detector) -> None:
    class Eager(FakeBackbone):
        def encode_images(self, pixels_B3HW: torch.Tensor):  # type: ignore[no-untyped-def]
            if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
                raise RuntimeError("not in a graph")
            return super().encode_images(pixels_B3HW)

    with pytest.raises(ExportError, match=r"washer cannot be exported as torchscript: not in a gr"):
        export_detector(Detector(Eager(patches=8), detector.prompt_set), "torchscript")


def test_settings_that_a_format_lacks_are_refused(detector: Detector) -> None:
    with pytest.raises(SettingsError, match="torchscript has no int8: choose float32"):
        export_detector(detector, "torchscript", precision="int8")


def test_damaged_and_foreign_files_are_refused(
    exported: tuple[Format, Export], tmp_path: Path
) -> None:
    made = exported[1]
    path = made.save(tmp_path)
    with pytest.raises(ExportError, match=r"cannot read .*missing"):
        ExportedDetector.load(tmp_path / f"missing{path.suffix}")
    for rubbish in (b"", b"rubbish", path.read_bytes()[:1000]):
        (tmp_path / f"bad{path.suffix}").write_bytes(rubbish)
        (tmp_path / "bad.bin").write_bytes(b"")
        with pytest.raises(ExportError, match=r"bad.* (cannot be read|was not exported)"):
            ExportedDetector.load(tmp_path / f"bad{path.suffix}")
    with pytest.raises(ExportError, match="no exported graph"):
        ExportedDetector.load(tmp_path / "washer.safetensors")
    if path.suffix == ".xml":  # weights of another graph, which can be read as well
        weights = np.frombuffer(made.files[".bin"], np.uint8).copy()
        weights[: len(weights) // 4 * 4].view(np.float32)[::16] = 0.3
        path.with_suffix(".bin").write_bytes(weights.tobytes())
        with pytest.raises(ExportError, match=r"scores its test image|cannot be read"):
            ExportedDetector.load(path)


def test_headers_of_other_versions_are_refused(detector: Detector) -> None:
    header = export_detector(detector, "torchscript").header
    text = header.model_dump_json()
    assert ExportHeader.read(text, "x") == header
    newer = json.dumps(json.loads(text) | {"format_version": 9})
    with pytest.raises(ExportError, match=r"x has format 9, this version of apt-ray reads 1"):
        ExportHeader.read(newer, "x")
    with pytest.raises(ExportError, match=r"fields differ, first .'colour'"):
        ExportHeader.read(json.dumps(json.loads(text) | {"colour": 1}), "x")
    for damaged in ("{", "[]", "{}"):
        with pytest.raises(ExportError, match="header of x is damaged"):
            ExportHeader.read(damaged, "x")
    with pytest.raises(ExportError, match="not exported by apt-ray"):
        ExportHeader.read(None, "x")


def test_the_built_in_backbone_is_exported_and_inspects_from_the_terminal(
    prompt_set: PromptSet,
    backbone: FrozenCLIP,
    category: Category,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "set.safetensors"
    prompt_set.save(file)
    picture = str(category.test[0].path)
    arguments = ["export", str(file), "--out", str(tmp_path), "--threshold", "0.25"]
    assert main([*arguments, "--images", picture, "--batch", "1"]) == 0
    said = capsys.readouterr().out
    assert "scores of 5 images differ" in said
    assert "threshold 0.2500" in said
    graph = tmp_path / f"{category.name}.onnx"
    for each in (graph, file):
        results = tmp_path / f"{each.suffix}.json"
        assert main(["inspect", str(each), picture, "--json", str(results)]) == 0
    ours, theirs = (
        json.loads((tmp_path / f"{suffix}.json").read_text())[0]
        for suffix in (".safetensors", ".onnx")
    )
    assert theirs["anomaly_score"] == pytest.approx(ours["anomaly_score"], abs=1e-4)
    assert theirs["threshold"] == 0.25
    assert main(["inspect", str(graph), picture, "--device", "cuda"]) == 1
    assert "runs on the CPU" in capsys.readouterr().err


def test_a_place_that_takes_no_file_is_named_before_anything_is_exported(
    detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write"):
        export_detector(detector, "torchscript").save(tmp_path / "file")
    arguments = ["export", str(tmp_path / "absent.safetensors"), "--out", str(tmp_path / "file")]
    assert main(arguments) == 1
    assert "cannot write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--size", "1920"])
    assert "not WIDTHxHEIGHT" in capsys.readouterr().err
