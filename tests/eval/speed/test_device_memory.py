"""What fits in a GPU is counted from the tensors themselves."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed: there are no GPU backends to count")

from speedstack.eval.speed.device_memory import PROCESS_BYTES, USABLE, backend_bytes, layers_that_fit, peer_bytes
from speedstack.runtime.model.released_models import released_config, released_spec

H200_BYTES = 139 * 2**30
LENGTH = 16384 + 160


@pytest.mark.parametrize(("model", "gigabytes"), [("qwen3-30b-a3b", (18, 22)), ("gpt-oss-20b", (13, 16))])
def test_models_fit_twice_beside_their_peer(model: str, gigabytes: tuple[float, float]) -> None:
    """Experts take 4.25 bits a weight: 29B of Qwen's are 15.4 GB, 19B of gpt-oss' 10.2 GB. The rest is 2 bytes each."""
    spec = released_spec(model)
    one = backend_bytes(spec, LENGTH)
    assert gigabytes[0] < one / 1e9 < gigabytes[1]
    left = H200_BYTES - 2 * PROCESS_BYTES - sum(peer_bytes(released_config(model, n), LENGTH) for n in (2, 4))
    assert layers_that_fit(spec, LENGTH, 2, left) == spec.num_layers


def test_mimo_is_cut_to_what_fits() -> None:
    """A layer's 256 experts of 3 * 4096 * 2048 weights are 3.4 GB packed."""
    spec = released_spec("mimo-v2-flash")
    alone, beside = (layers_that_fit(spec, LENGTH, processes, H200_BYTES) for processes in (1, 2))
    assert 36 <= alone <= 42 and 17 <= beside <= 20
    for num_layers, processes in ((alone, 1), (beside, 2)):
        cut, more = (replace(spec, layers=spec.layers[: num_layers + extra]) for extra in (0, 1))
        needed = [processes * (backend_bytes(each, LENGTH) + PROCESS_BYTES) for each in (cut, more)]
        assert needed[0] <= USABLE * H200_BYTES < needed[1]
    with pytest.raises(ValueError, match="not one layer of mimo_v2_flash fits"):
        layers_that_fit(spec, LENGTH, 1, 4 << 30)


def test_the_count_by_hand() -> None:
    """Qwen3-30B-A3B: 48 layers, D 2048, 32 query and 4 key/value heads of 128, 128 experts of 768, 151,936 tokens."""
    experts = 48 * 128 * 3 * 2048 * 768 * 4.25 / 8
    qkv = 48 * (32 + 2 * 4) * 128 * 2048 * 2
    output, head = 48 * 32 * 128 * 2048 * 2, 2 * 151936 * 2048 * 2
    router = 48 * 128 * 2048 * 4
    caches = 48 * 4 * 2 * 128 * 2 * LENGTH
    by_hand = experts + 2 * qkv + output + head + router + caches  # qkv once more, sorted for its kernel
    # Norms, activations and logits are small.
    assert by_hand < backend_bytes(released_spec("qwen3-30b-a3b"), LENGTH) < 1.01 * by_hand


def test_a_peer_by_hand() -> None:
    """One layer of MiMo is dense, the next has 256 experts of 2048: 3 * 4096 * 2048 weights of two bytes each."""
    one, two = (peer_bytes(released_config("mimo-v2-flash", n), 1024) for n in (1, 2))
    assert two - one == pytest.approx(256 * 3 * 4096 * 2048 * 2, rel=0.02)
