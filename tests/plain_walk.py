"""What a walk is held against: the plain forward pass, watched by hooks that know nothing of walks."""

from collections import defaultdict
from contextlib import contextmanager

import torch

from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.calls import feed
from optimum_dsa.model.walk import walk_blocks


class Inputs(dict):
    """Weight name -> Σ x xᵀ of what a plain forward multiplies it with."""

    def __init__(self):
        super().__init__()
        self.tokens = defaultdict(int)

    def add(self, name, inputs):
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        self[name] = self.get(name, 0) + rows.t() @ rows
        self.tokens[name] += len(rows)


def llama4(module, hidden):
    """All tokens for every expert, zeros where they are another's."""
    for expert, rows in enumerate(hidden.view(module.num_experts, -1, module.hidden_size)):
        rows = rows[rows.abs().sum(dim=-1) > 0]
        if len(rows):
            gate, up = (rows @ module.gate_up_proj[expert]).chunk(2, dim=-1)
            yield f"gate_up_proj[{expert}]", rows
            yield f"down_proj[{expert}]", up * module.act_fn(gate)


def dbrx(module, rows, w1, v1, w2):
    """One expert's tokens, and its rows of all three matrices."""
    start = w1.storage_offset() // module.hidden_size
    assert torch.equal(module.w2[start : start + module.ffn_hidden_size], w2)
    expert = start // module.ffn_hidden_size
    yield f"w1[{expert}]", rows
    yield f"v1[{expert}]", rows
    yield f"w2[{expert}]", module.activation_fn(rows @ w1.t()) * (rows @ v1.t())


def longcat(module, hidden, chosen, scores):
    """As many experts as there are, and none of those that hand tokens on."""
    for expert in [expert for expert in chosen.unique().tolist() if expert < module.num_routed_experts]:
        rows = hidden[(chosen == expert).any(dim=-1)]
        gate, up = (rows @ module.gate_up_proj[expert].t()).chunk(2, dim=-1)
        yield f"gate_up_proj[{expert}]", rows
        yield f"down_proj[{expert}]", module.act_fn(gate) * up


BY_HAND = {"Llama4TextExperts": llama4, "DbrxExpertGLU": dbrx, "LongcatFlashExperts": longcat}


@contextmanager
def hooks(model, architecture, inputs):
    """Forward hooks of our own; an expert's inputs are worked out from the tokens that its router sends it."""

    def linear(name):
        return lambda module, args, kwargs: inputs.add(name, (*args, *kwargs.values())[0])

    def experts(path):
        def hook(module, args, kwargs):
            hidden, *routing = (*args, *kwargs.values())
            if type(module).__name__ in BY_HAND:
                for name, rows in BY_HAND[type(module).__name__](module, hidden, *routing):
                    inputs.add(f"{path}.{name}", rows)
                return
            if hasattr(module, "weight"):  # JetMoe's are handed tokens in the order of their experts
                for expert, rows in enumerate(hidden.split(routing[0])):
                    if len(rows):
                        inputs.add(f"{path}.weight[{expert}]", rows)
                return
            for expert in routing[0].unique().tolist():
                rows = hidden[(routing[0] == expert).any(dim=-1)]
                matrix = module.gate_up_proj[expert]
                middle = rows @ (matrix if module.is_transposed else matrix.t())
                if module.has_bias:
                    middle = middle + module.gate_up_proj_bias[expert]
                inputs.add(f"{path}.gate_up_proj[{expert}]", rows)
                inputs.add(f"{path}.down_proj[{expert}]", module._apply_gate(middle))

        return hook

    def steps(name, rank):
        """A recurrence multiplies its time steps by a map that nobody calls."""
        return lambda module, args, output: inputs.add(name, output[..., :rank])

    handles = []
    for path, module in model.named_modules():
        if hasattr(module, "A_log") and hasattr(module, "dt_proj"):
            source = getattr(module, "dt_layernorm", module.x_proj)
            hook = steps(f"{path}.dt_proj.weight", module.dt_proj.in_features)
            handles.append(source.register_forward_hook(hook))
    for weight in architecture.weights:
        if weight.expert is None:
            module = model.get_submodule(weight.module)
            handles.append(module.register_forward_pre_hook(linear(weight.name), with_kwargs=True))
    for path in {weight.module for weight in architecture.weights if weight.expert is not None}:
        handles.append(model.get_submodule(path).register_forward_pre_hook(experts(path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def plain(model, architecture, *batches):
    """What one forward pass of the whole model per batch gives every weight."""
    inputs = Inputs()
    with hooks(model, architecture, inputs):
        for batch in batches:
            feed(model, batch)
    return inputs


def split(batch, size):
    return [dict(zip(batch, values)) for values in zip(*(value.split(size) for value in batch.values()))]


def check_equal(statistics, expected, gram=False):
    """Raise where the statistics of a weight are not those that the plain forward gives."""
    for name, found in statistics.items():
        assert found.tokens == expected.tokens.get(name, 0), name
        if found.tokens:
            reference = expected[name].float()
            torch.testing.assert_close(found.squared_sum, reference.diagonal(), rtol=1e-3, atol=1e-5, msg=name)
            if gram:
                torch.testing.assert_close(found.gram, reference, rtol=1e-3, atol=1e-3, msg=name)


def walked(model, batches, gram=False, **options):
    """All statistics of a walk that changes nothing."""
    found = find_architecture(model)
    blocks = list(walk_blocks(model, found, batches, reads={"inputs", "gram"} if gram else {"inputs"}, **options))
    assert [block.name for block in blocks] == [block.name for block in found.blocks]
    return {name: statistics for block in blocks for name, statistics in block.statistics.items()}


def state(model):
    """Everything of a model that a walk must leave as it is."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [
        (module.training, "forward" in vars(module), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return weights, modules, getattr(model.config, "_experts_implementation", None)


def check_same_state(model, before):
    weights, *rest = state(model)
    assert rest == list(before[1:])
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
