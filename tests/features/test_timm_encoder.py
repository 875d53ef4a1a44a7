"""Models of timm with random weights, from files and from a hub that serves them."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from apt_ray.cli.main import main
from apt_ray.config import BackboneSpec
from apt_ray.data.folders import Category
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.errors import BackboneError, SettingsError
from apt_ray.features.timm_encoder import TimmEncoder
from apt_ray.features.torchvision_guard import import_timm

VIT, CNN = "test_vit", "test_resnet"
Weights = Callable[[str], Path]


def pixels(size: int, images: int = 1) -> torch.Tensor:
    return torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_random_weights(name: str, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return import_timm().create_model(name, **settings).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A model's name to a file of random weights of it."""
    folder = tmp_path_factory.mktemp("weights")

    @cache
    def saved(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        save_file(with_random_weights(name).state_dict(), path)
        return path

    return saved


@pytest.mark.parametrize(
    ("name", "size", "shapes", "wrong", "nearest"),
    [
        ("vit_small_patch14_reg4_dinov2", 112, [(64, 384)], 100, 98),
        ("vit_small_patch16_dinov3", 128, [(64, 384)], 120, 128),
        ("wide_resnet50_2", 64, [(64, 512), (16, 1024), (16, 1024)], 100, 96),
    ],
)
def test_published_encoders(
    weights: Weights, name: str, size: int, shapes: list[tuple[int, int]], wrong: int, nearest: int
) -> None:
    encoder = TimmEncoder(name, weights=weights(name), input_size=size)
    assert (encoder.input_size, encoder.grid) == (size, (8, 8))
    images = pixels(size, 2)
    together = encoder.encode(images)
    assert [layer.shape for layer in together.values()] == [(2, *shape) for shape in shapes]
    assert {layer.dtype for layer in together.values()} == {torch.float32}
    assert torch.allclose(together[0].norm(dim=-1), torch.ones(2, 64), atol=1e-5)
    again, *alone = map(encoder.encode, (images, *images.split(1)))
    for layer, tokens in together.items():
        assert torch.equal(again[layer], tokens)
        one_by_one = torch.cat([one[layer] for one in alone])
        assert torch.allclose(one_by_one, tokens, atol=1e-4)
    with pytest.raises(BackboneError, match=f"reference_input_size of {nearest}, the nearest"):
        TimmEncoder(name, weights=weights(name), input_size=wrong)


def test_a_vit_says_what_its_own_last_layer_says(weights: Weights) -> None:
    model = with_random_weights(VIT)
    image = pixels(160)
    with torch.no_grad():
        tokens = model.forward_features((image - 0.5) / 0.5)[:, model.num_prefix_tokens :]
    encoder = TimmEncoder(VIT, weights=weights(VIT), input_size=160)
    (directions,) = encoder.encode(image).values()
    assert torch.allclose(directions, F.normalize(tokens, dim=-1), atol=1e-5)


def test_a_cnn_says_what_its_own_stages_say(weights: Weights) -> None:
    model = with_random_weights(CNN, features_only=True)
    image = pixels(96)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        stage = model((image - mean) / std)[2]
    encoder = TimmEncoder(CNN, weights=weights(CNN), layers=(2,), input_size=96, pool=1)
    directions, lengths = encoder.encode(image).values()
    assert torch.allclose(directions, F.normalize(stage, dim=1).flatten(2).mT, atol=1e-5)
    assert torch.allclose(lengths, stage.flatten(2).mT, atol=1e-4)


def test_position_embeddings_are_interpolated(weights: Weights) -> None:
    encoder = TimmEncoder(VIT, weights=weights(VIT), input_size=224)
    assert encoder.encode(pixels(224))[0].shape == (1, 14 * 14, 64)


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        (VIT, {"layers": (5,), "input_size": 448, "pool": 1}),
        (CNN, {"layers": (2, 3), "input_size": 320, "pool": 1}),
        ("pit_ti_224", {"layers": (0, 1), "input_size": 224, "pool": 1}),  # of one size alone
    ],
)
def test_defaults(weights: Weights, name: str, defaults: dict[str, Any]) -> None:
    spelt = TimmEncoder(name, weights=weights(name), **defaults)
    assert TimmEncoder(name, weights=weights(name)).fingerprint == spelt.fingerprint


@pytest.mark.parametrize("name", [VIT, CNN])
def test_what_is_behind_the_last_layer_does_not_count(
    weights: Weights, tmp_path: Path, name: str
) -> None:
    def read(state: dict[str, torch.Tensor]) -> TimmEncoder:
        save_file(state, path := tmp_path / "weights.safetensors")
        return TimmEncoder(name, weights=path, layers=(1,), input_size=96)

    state = with_random_weights(name).state_dict()
    first, last = {VIT: ("blocks.1", "blocks.2"), CNN: ("layer1", "layer2")}[name]
    before, behind = (next(key for key in state if key.startswith(part)) for part in (first, last))
    plain = read(state)
    unread = read({**state, behind: state[behind] + 1})
    assert unread.fingerprint == plain.fingerprint
    for found, expected in zip(
        unread.encode(pixels(96)).values(), plain.encode(pixels(96)).values(), strict=True
    ):
        assert torch.equal(found, expected)
    assert read({**state, before: state[before] + 1}).fingerprint != plain.fingerprint


def test_the_fingerprint_tells_encoders_apart(weights: Weights) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"layers": (4,)},
        {"input_size": 112},
        {"pool": 3},
        {"precision": torch.bfloat16},
    ]
    found = {
        TimmEncoder(VIT, weights=weights(VIT), **{"input_size": 96, **other}).fingerprint
        for other in settings
    }
    assert len(found) == len(settings)


def test_bfloat16_says_nearly_the_same(weights: Weights) -> None:
    exact, rounded = (
        TimmEncoder(name, weights=weights(name), input_size=96, precision=precision)
        for name, precision in ((CNN, torch.float32), (CNN, torch.bfloat16))
    )
    found = rounded.encode(pixels(96))[0]
    assert found.dtype == torch.float32
    assert (found * exact.encode(pixels(96))[0]).sum(-1).min() > 0.99


def test_a_checkpoint_of_torch_and_a_head_of_its_own(weights: Weights, tmp_path: Path) -> None:
    """As whoever goes on training a model leaves it."""
    state = with_random_weights(CNN).state_dict()
    head = {"fc.weight": torch.zeros(7, state["fc.weight"].shape[1]), "fc.bias": torch.zeros(7)}
    torch.save({"epoch": 3, "state_dict": state | head}, path := tmp_path / "last.pth.tar")
    plain = TimmEncoder(CNN, weights=weights(CNN), input_size=96)
    assert TimmEncoder(CNN, weights=path, input_size=96).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("wide_resnet_50", {}, r"no model 'wide_resnet_50': did you mean .*wide_resnet50_2"),
        ("no such thing", {}, r"no model 'no such thing': `python"),
        (f"{VIT}.lvd142m", {}, "its tags are r160_in1k"),
        ("resnet200", {}, "no weights of resnet200: give a checkpoint file"),
    ],
)
def test_names_that_mean_nothing(name: str, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BackboneError, match=complaint):
        TimmEncoder(name, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        (VIT, {"layers": (5, 6)}, r"blocks 0 to 5: choose .* \(got \(5, 6\)\)"),
        (VIT, {"layers": (-1,)}, "blocks 0 to 5"),
        (CNN, {"layers": (3, 2)}, "stages 0 to 4: .* in ascending order"),
        (VIT, {"input_size": 5}, "reference_input_size of 16"),
        ("pit_ti_224", {"input_size": 320}, "only takes images of 224 pixels"),
        ("test_maxvit", {"input_size": 96}, r"cannot read .* such as its own \(160\)"),
    ],
)
def test_settings_that_do_not_suit(
    weights: Weights, name: str, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BackboneError, match=complaint):
        TimmEncoder(name, weights=weights(name), **settings)


def test_a_model_without_features(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(with_random_weights(CNN)), "forward_intermediates")
    with pytest.raises(BackboneError, match=f"timm:{CNN} does not give the features"):
        TimmEncoder(CNN, weights=weights(CNN))


def test_wrong_files(weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"none\.pth is missing, .* put it there again"):
        TimmEncoder(VIT, weights=tmp_path / "none.pth")
    for name in ("garbage.safetensors", "garbage.pth"):
        (garbage := tmp_path / name).write_bytes(b"garbage" * 50)
        with pytest.raises(BackboneError, match=f"cannot read .*{name}"):
            TimmEncoder(VIT, weights=garbage)
    torch.save({"model": Category}, harmful := tmp_path / "harmful.pth")
    with pytest.raises(BackboneError, match=r"cannot read .*harmful\.pth"):
        TimmEncoder(VIT, weights=harmful)
    torch.save({}, empty := tmp_path / "empty.pth")
    with pytest.raises(BackboneError, match="it is empty"):
        TimmEncoder(VIT, weights=empty)
    with pytest.raises(BackboneError, match=rf"does not hold .*timm:{VIT} .*Missing key"):
        TimmEncoder(VIT, weights=weights(CNN))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"reference_encoder": "resnet50"}, "timm:"),
        ({"reference_encoder": "timm:"}, "timm:"),
        ({"reference_encoder": "trunk", "reference_pretrained": "a"}, "set reference_encoder to"),
    ],
)
def test_specs_that_do_not_suit(spec: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        BackboneSpec.parse(spec)


def test_a_fit_is_inspected_with_the_same_file(
    category: Category, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(weights(CNN).read_bytes())
    fitted = str(tmp_path / "fitted.safetensors")
    image = str(category.good[0])
    encoder = ["--reference-encoder", f"timm:{CNN}", "--reference-pretrained", str(checkpoint)]
    settings = ["--reference-input-size", "96", "--shots", "2", "--steps", "2"]
    assert main(["fit", "--data", str(category.root), "--out", fitted, *encoder, *settings]) == 0
    prompt_set = PromptSet.load(Path(fitted))
    widths = {layer: rows.shape[1] for layer, rows in prompt_set.memory.layers.items()}
    assert widths == {0: 48, 1: 192, 2: 192}
    assert len(prompt_set.provenance.scales.layers) == len(prompt_set.memory.layers)
    assert main(["inspect", fitted, image]) == 0
    checkpoint.unlink()
    capsys.readouterr()
    assert main(["inspect", fitted, image]) == 1
    assert f"error: {checkpoint} is missing" in capsys.readouterr().err
    checkpoint.write_bytes(weights(VIT).read_bytes())
    assert main(["inspect", fitted, image]) == 1
    assert f"does not hold the weights of timm:{CNN}" in capsys.readouterr().err


SERVED, FOREIGN, DAMAGED, ABSENT = (
    f"{name}.r160_in1k" for name in ("test_vit", "test_vit2", "test_convnext", "test_resnet")
)


@contextmanager
def hub(weights: dict[str, bytes]) -> Iterator[str]:
    """The address of a server that has weights as the hub has them."""
    files = {f"/timm/{name}/resolve/main/model.safetensors": weights[name] for name in weights}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path, b"")
            self.send_response(200 if content else 404)
            if content:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def loading(environment: dict[str, str]) -> Iterator[Callable[[str], str]]:
    """A name to its fingerprint or error, in a process of its own with the hub's real client,
    which reads its variables when it is imported."""
    program = (
        "import json, sys\n"
        "from apt_ray.errors import BackboneError\n"
        "from apt_ray.features.timm_encoder import TimmEncoder\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        answer = TimmEncoder(json.loads(line), input_size=96).fingerprint\n"
        "    except BackboneError as error:\n"
        "        answer = str(error)\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**kept, **environment, "NO_PROXY": "127.0.0.1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        questions, answers = process.stdin, process.stdout

        def load(name: str) -> str:
            print(json.dumps(name), file=questions, flush=True)
            answer: str = json.loads(answers.readline())
            return answer

        yield load


def test_weights_of_the_hub(weights: Weights, tmp_path: Path) -> None:
    right = weights(VIT).read_bytes()
    of_file = TimmEncoder(SERVED, weights=weights(VIT), input_size=96).fingerprint
    served = {SERVED: right, FOREIGN: right, DAMAGED: b"garbage" * 50}
    with ExitStack() as processes:
        with hub(served) as address:
            environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
            load = processes.enter_context(loading(environment))
            assert load(SERVED) == of_file
            assert f"not hold the weights of timm:{FOREIGN} (Error(s) in loading" in load(FOREIGN)
            damaged = load(DAMAGED)
            assert f"not hold the weights of timm:{DAMAGED} (Error while des" in damaged
            assert "remove them from the cache (HF_HOME)" in damaged
            assert f"cannot download the weights of timm:{ABSENT} (404" in load(ABSENT)
        assert load(SERVED) == of_file  # the server is down
    with loading({**environment, "HF_HUB_OFFLINE": "1"}) as load:
        assert load(SERVED) == of_file
        absent = load(ABSENT)
        assert f"cannot download the weights of timm:{ABSENT}" in absent
        for remedy in ("reference_pretrained", "HF_HOME", "HF_ENDPOINT"):
            assert remedy in absent
