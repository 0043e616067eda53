import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from rlhfbench.measure.ledger import Ledger
from rlhfkernels.observer import PARTS

FLOAT = 4


def parts(**some):
    return {part: some.get(part, 0) for part in PARTS}


def walk():
    """Returns bytes by address of every live storage, found through the garbage collector's tensors."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


class Walked(Ledger):
    """A ledger that compares itself with an independent walk at the end of every phase."""

    def __enter__(self):
        self.before = walk()
        self.num_walks = 0
        return super().__enter__()

    def exit_phase(self, name):
        super().exit_phase(name)
        found, live = walk(), {key: entry.num_bytes for key, entry in self._storages.entries.items()}
        assert live == {key: size for key, size in found.items() if key not in self.before or key in live}
        assert sum(live.values()) == self.total_bytes == sum(self.parts.values())
        self.num_walks += 1


def mlp(inner=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, inner), nn.ReLU(), nn.Linear(inner, 1))


# A two-layer network, 8 -> 16 -> 1, on 4 rows.
WEIGHTS = (8 * 16 + 16 + 16 + 1) * FLOAT
INPUT, HIDDEN, OUTPUT = 4 * 8 * FLOAT, 4 * 16 * FLOAT, 4 * FLOAT


def test_a_small_network_by_hand():
    net, x = mlp(), torch.ones(4, 8)
    with Ledger("cpu") as ledger:
        ledger.tag("base", net.parameters())
        ledger.track_gradients(net.parameters())
        with ledger.phase("forward"):
            out = net(x)
        # Saved for the backward pass: each linear layer's input (the second's is also the ReLU's output).
        assert ledger.parts == parts(base=WEIGHTS, activations=INPUT + HIDDEN, temporary=OUTPUT)
        # At the peak of the forward pass the ReLU's input was live, and the network's output not yet.
        assert ledger.peaks["forward"].parts == parts(base=WEIGHTS, activations=INPUT + HIDDEN, temporary=HIDDEN)
        with ledger.phase("backward"):
            out.backward(torch.ones_like(out))
        del out
        assert ledger.parts == parts(base=WEIGHTS, gradients=WEIGHTS, temporary=INPUT)
        net.zero_grad()
        assert ledger.parts == parts(base=WEIGHTS, temporary=INPUT)
    assert ledger.peak_phase == "backward"
    assert ledger.peak == ledger.peaks["backward"]
    assert ledger.peak.total_bytes == sum(ledger.peak.parts.values())
    assert ledger.largest.num_bytes == HIDDEN
    assert ledger.largest.shape == (4, 16)
    assert ledger.largest.op == "aten.addmm.default"


def test_fake_tensors_give_the_same_bytes():
    def measure(make):
        with Ledger("cpu") as ledger:
            first, second = (make(8, 16, requires_grad=True) for _ in range(2))
            ledger.tag("base", (first, second))
            ledger.track_gradients((first, second))
            with ledger.phase("forward"):
                out = checkpoint(lambda x: (x @ first).relu() @ second.T, make(4, 8), use_reentrant=False)
            with ledger.phase("backward"):
                out.backward(torch.ones_like(out))
        return ledger.peaks, ledger.largest

    real = measure(torch.ones)
    assert real[0]["backward"].parts["activations"] > 0
    with FakeTensorMode():
        assert measure(torch.empty) == real


def test_fake_tensors_count_on_their_fake_device():
    with FakeTensorMode(), Ledger("cuda") as ledger:
        torch.ones(4, 8)
        x = torch.empty(4, 8, device="cuda")
        ledger.tag("rollout", [x, torch.empty(4, 8)])
        kept = x @ torch.empty(8, 16, device="cuda")
        assert ledger.parts == parts(rollout=INPUT, temporary=HIDDEN)
        del kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_activations_are_layer_inputs_and_one_recomputed_layer(reentrant):
    layers = nn.ModuleList([mlp(64).append(nn.Linear(1, 8)) for _ in range(3)])
    x = torch.ones(4, 8, requires_grad=True)
    seen = []
    with Ledger("cpu", on_change=lambda live: seen.append(live[PARTS.index("activations")])) as ledger:
        ledger.tag("base", layers.parameters())
        ledger.track_gradients(layers.parameters())
        h = x
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=reentrant)
        loss = h.sum()
        del h, layer
        assert ledger.parts["activations"] == 3 * INPUT
        seen.clear()
        loss.backward()
        # The inputs of all layers, and the recomputed hidden state (4 x 64) and inner output (4 x 1) of the last.
        assert max(seen) == 3 * INPUT + 4 * 64 * FLOAT + OUTPUT
        assert ledger.parts["activations"] == 0


def test_a_tensor_that_other_hooks_offload_is_no_activation():
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8)
    away = saved_tensors_hooks(lambda tensor: tensor.tolist(), torch.tensor)
    with Ledger("cpu") as ledger, away:
        ledger.tag("base", [weight])
        out = (x @ weight).exp().sum()
        assert ledger.parts == parts(base=8 * 8 * FLOAT, temporary=INPUT + FLOAT)
        out.backward()
    assert torch.allclose(weight.grad, torch.full((8, 8), 4 * torch.e**8))


def test_other_hooks_get_parameters_as_they_are():
    weight, seen = nn.Parameter(torch.ones(8, 8)), []
    with Ledger("cpu"), saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        (torch.ones(4, 8, requires_grad=True) @ weight).sum().backward()
    assert [id(tensor) for tensor in seen if isinstance(tensor, nn.Parameter)] == [id(weight)]
    assert len(seen) == 2


def test_tensors_passed_by_keyword_are_counted_at_their_first_use():
    x, mask = torch.ones(1, 1, 4, 8), torch.zeros(4, 4)
    with Ledger("cpu") as ledger:
        nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        assert ledger.parts == parts(temporary=x.nbytes + mask.nbytes)


def test_a_nested_tensor_counts_its_values_and_offsets():
    with Ledger("cpu") as ledger:
        x = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=torch.jagged, requires_grad=True)
        offsets = 3 * 8
        assert ledger.parts == parts(temporary=8 * 4 * FLOAT + offsets)
        y = x.exp()
        del x
        assert ledger.parts["activations"] >= 8 * 4 * FLOAT
        del y
        assert ledger.total_bytes == 0


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc])
def test_a_compressed_sparse_tensor_counts_its_indices_and_values(layout):
    block = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else ()
    components = torch.arange(9), torch.arange(8), torch.ones(8, *block)
    sparse = torch.sparse_compressed_tensor(*components, layout=layout)
    with Ledger("cpu") as ledger:
        doubled = sparse * 2
        held = sum(each.nbytes for each in components)
        assert ledger.total_bytes >= held + components[2].nbytes  # an op may share indices with its input
        del doubled
        assert ledger.total_bytes == held


def test_a_sparse_tensor_counts_its_indices_and_values():
    eye = torch.eye(8)
    with Ledger("cpu") as ledger:
        sparse = eye.to_sparse()
        assert ledger.parts == parts(temporary=eye.nbytes + 2 * 8 * 8 + 8 * FLOAT)
        del sparse
        assert ledger.parts == parts(temporary=eye.nbytes)


def test_sparse_gradients_are_gradients():
    embedding = nn.Embedding(10, 4, sparse=True)
    with Ledger("cpu") as ledger:
        ledger.track(embedding)
        embedding(torch.tensor([1, 2])).sum().backward()
        assert ledger.parts["gradients"] == 2 * 8 + 2 * 4 * FLOAT


def test_saved_weights_views_of_weights_and_rollouts_are_no_activations():
    weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    mask = torch.ones(4, 8)
    with Ledger("cpu") as ledger:
        ledger.tag("base", [weight])
        ledger.tag("rollout", [x, mask])
        out = (x @ weight.T[:, :8]) * mask
        assert out.grad_fn is not None
        assert ledger.parts == parts(base=8 * 8 * FLOAT, rollout=2 * INPUT, temporary=INPUT)


def test_a_storage_is_temporary_again_after_its_last_saved_reference():
    x = torch.ones(4, 8, requires_grad=True)
    with Ledger("cpu") as ledger:
        y = x * 2
        first, second = y.exp(), y * y
        assert ledger.parts["activations"] == 2 * INPUT  # y and exp(y); x * 2 saves neither
        second.sum().backward(retain_graph=False)
        del second
        first_only = ledger.parts["activations"]
        assert first_only == INPUT
        del first
        assert ledger.parts["activations"] == 0
        assert ledger._storages.entries[y.untyped_storage()._cdata].num_bytes == INPUT


def test_a_saved_output_does_not_keep_itself_alive():
    x = torch.ones(4, 8, requires_grad=True)
    with Ledger("cpu") as ledger:
        x.exp()
        assert ledger.total_bytes == INPUT


def test_views_count_once_and_the_first_declaration_wins():
    tied = torch.ones(8, 8)
    with Ledger("cpu") as ledger:
        ledger.tag("base", [tied])
        ledger.tag("heads", [tied.T, tied[2:]])
        assert ledger.parts == parts(base=8 * 8 * FLOAT)
        view = torch.ones(4, 8)[1:2]
        assert ledger.parts["temporary"] == INPUT  # the view keeps the whole storage alive
        ledger.tag("kv_cache", [view])
        assert ledger.parts == parts(base=8 * 8 * FLOAT, kv_cache=INPUT)


def test_older_tensors_count_from_their_first_use_and_those_on_other_devices_never():
    old, elsewhere = torch.ones(4, 8), torch.ones(4, 8, device="meta")
    with Ledger("cpu") as ledger:
        assert ledger.total_bytes == 0
        old.add_(1)
        elsewhere.add_(1)
        assert ledger.parts == parts(temporary=INPUT)


def test_resized_storages():
    with Ledger("cpu") as ledger, ledger.phase("only"):
        x = torch.empty(0)
        x.resize_(10)
        assert ledger.total_bytes == 10 * FLOAT
        torch.add(torch.ones(100), 1, out=x.resize_(0))
        assert ledger.total_bytes == 100 * FLOAT
        x.untyped_storage().resize_(0)
        assert ledger.total_bytes == 0
        x.untyped_storage().resize_(7)
        assert ledger.total_bytes == 7
        other = torch.ones(3)
        x.set_(other)
        assert ledger.total_bytes == 3 * FLOAT
        y = torch.ones(1000)
        ledger.enter_phase("grow")
        y.resize_(2000)  # old and new memory are both live while the content is copied
        assert ledger.total_bytes == 2003 * FLOAT
        ledger.exit_phase("grow")
    assert ledger.peaks["grow"].total_bytes == 3003 * FLOAT


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_ops_of_optimizers_that_take_lists_and_return_nothing(options):
    net, x = mlp(), torch.ones(4, 8)
    with Walked("cpu") as ledger:
        ledger.tag("base", net.parameters())
        ledger.track_gradients(net.parameters())
        optimizer = torch.optim.AdamW(net.parameters(), **options)
        for _ in range(2):
            with ledger.phase("update"):
                net(x).sum().backward()
            with ledger.phase("optimize"):
                optimizer.step()
            ledger.tag("optimizer", [t for state in optimizer.state.values() for t in state.values()])
        counters = 4 * FLOAT  # the step count of each parameter
        assert ledger.parts == parts(base=WEIGHTS, gradients=WEIGHTS, optimizer=2 * WEIGHTS + counters, temporary=INPUT)
        assert ledger.num_walks == 4


def test_ops_that_return_lists_and_tuples():
    x = torch.ones(4, 8)
    with Ledger("cpu") as ledger:
        both = torch.split_with_sizes_copy(x, [2, 2])
        assert ledger.total_bytes == 2 * INPUT
        values, indices = x.max(1)
        assert ledger.total_bytes == 2 * INPUT + 4 * FLOAT + 4 * 8
        del both, values, indices
        assert ledger.total_bytes == INPUT


def test_accumulated_and_existing_gradients():
    weight = torch.ones(4, 8, requires_grad=True)
    weight.grad = torch.ones(4, 8)
    with Ledger("cpu") as ledger:
        ledger.tag("base", [weight])
        ledger.track_gradients([weight])
        assert ledger.parts == parts(base=INPUT, gradients=INPUT)
        for _ in range(2):
            weight.sum().backward()
        assert ledger.parts == parts(base=INPUT, gradients=INPUT)


def test_a_backward_pass_inside_a_backward_pass():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                (x,) = ctx.saved_tensors
                inner = x.detach().requires_grad_()
                inner.exp().sum().backward()
            return gradient * 2 + inner.grad * 0

    x = torch.ones(4, 8, requires_grad=True)
    with Walked("cpu") as ledger:
        ledger.track_gradients([x])
        with ledger.phase("forward"):
            out = Doubled.apply(x).sum()
        with ledger.phase("backward"):
            out.backward()
        assert ledger.parts == parts(gradients=INPUT, temporary=INPUT + FLOAT)


def test_a_phase_has_the_peak_of_all_its_stretches_without_inner_phases():
    with Ledger("cpu") as ledger:
        with ledger.phase("a"):
            torch.ones(10)
        with ledger.phase("b"):
            kept = torch.ones(5)
            with ledger.phase("c"):
                torch.ones(100)
            torch.ones(1)
        with ledger.phase("a"):
            torch.ones(20)
        del kept
    assert {name: peak.total_bytes // FLOAT for name, peak in ledger.peaks.items()} == {"a": 25, "b": 6, "c": 105}
    assert ledger.peak_phase == "c"


def test_a_phase_without_an_op_has_what_lives_already():
    x = torch.ones(4, 8)
    with Ledger("cpu") as ledger:
        ledger.tag("rollout", [x])
        with ledger.phase("idle"):
            pass
    assert ledger.peaks["idle"].parts == parts(rollout=INPUT)


def test_the_largest_tensor_is_no_weight_and_no_gradient():
    weight = torch.ones(100, 100, requires_grad=True)
    with Ledger("cpu") as ledger:
        ledger.tag("base", [weight])
        ledger.track_gradients([weight])
        (weight[:2] * 3).sum().backward()
        weight.grad = None
    assert ledger.largest.shape == (2, 100)


def test_on_change_is_called_after_every_change():
    seen = []
    with Ledger("cpu", on_change=lambda live: seen.append(list(live))) as ledger:
        x = torch.ones(4, 8)
        ledger.tag("rollout", [x])
        del x
    index = PARTS.index
    assert [live[index("temporary")] for live in seen] == [INPUT, 0, 0]
    assert [live[index("rollout")] for live in seen] == [0, INPUT, 0]
    assert ledger.num_changes == 3


def test_an_unknown_part_is_an_error():
    with Ledger("cpu") as ledger, pytest.raises(ValueError, match=r"part 'heads_' is unknown: did you mean 'heads'\?"):
        ledger.tag("heads_", [torch.ones(1)])


def test_no_hook_stays_behind():
    resize, enter = torch.UntypedStorage.resize_, torch.autograd.graph.saved_tensors_hooks.__enter__
    net, ledger, held = mlp(), Ledger("cpu"), [torch.ones(4, 8), torch.ones(4, 8)]

    def fail():
        with ledger:
            ledger.track_gradients(net.parameters())
            ledger.tag("rollout", held)
            net(held[0][:, :7])

    with pytest.raises(RuntimeError, match="shapes"):
        fail()
    num_changes = ledger.num_changes
    net(held[0]).sum().backward()
    held[0].untyped_storage().resize_(0)
    held.clear()
    assert ledger.num_changes == num_changes
    assert torch.UntypedStorage.resize_ is resize
    assert torch.autograd.graph.saved_tensors_hooks.__enter__ is enter
    assert all(not parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def test_a_ledger_changes_no_gradient():
    def gradients():
        net = mlp()
        checkpoint(net, torch.ones(4, 8), use_reentrant=False).exp().sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    plain = gradients()
    with Ledger("cpu"):
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_saved_parameter_whose_storage_is_exchanged_keeps_nothing():
    """ZeRO-3 frees a weight between forward and backward: autograd saves the parameter, not its storage."""
    weight = nn.Parameter(torch.ones(16, 8))
    x = torch.ones(4, 16, requires_grad=True)
    with Ledger("cpu") as ledger:
        ledger.tag("rollout", [x])
        weight.data = torch.ones(16, 8)
        ledger.tag("gathered", [weight])
        y = x @ weight
        weight.data = torch.empty(0)
        assert ledger.parts["gathered"] == 0
        weight.data = torch.ones(16, 8)
        y.sum().backward()
    assert x.grad is not None
