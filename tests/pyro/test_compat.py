"""One small test for each thing that pplgrad uses of torch and Pyro beyond their documented interface: it says what moved."""

import importlib
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad.pyro import _compat as internals
from pplgrad.pyro._reuse.known_code import CHANGING

CLASSES = {
    "torch.Tag": torch.Tag,
    "torch.distributions.Distribution": torch.distributions.Distribution,
    "torch.utils._python_dispatch.TorchDispatchMode": TorchDispatchMode,
}
NAMES = [
    ("pyro.poutine.runtime", "_PYRO_STACK", "other_handlers() in _compat.py looks at Pyro's stack of handlers"),
    ("pyro.poutine.runtime", "_ENUM_ALLOCATOR", "enumerate_from() in _compat.py says where the dimensions of summed sites begin"),
    ("pyro.poutine.enum_messenger", "EnumMessenger", "_tracing/marginal_sites.py lets sites take all their values at once by it"),
    ("pyro.ops.contract", "contract_tensor_tree", "_tracing/marginal_sites.py sums products of densities by it"),
    ("pyro.ops.rings", "LogRing", "_tracing/marginal_sites.py sums products of densities in it"),
    ("pyro.ops.rings", "MapRing", "_tracing/posterior_of_sums.py finds most probable values in it"),
    ("pyro.ops.rings", "SampleRing", "_tracing/posterior_of_sums.py draws joint samples in it"),
    ("pyro.ops.einsum.adjoint", "require_backward", "ask_for_indices() in _compat.py asks by it at which values a maximum or a sample is"),
    ("pyro.distributions.torch_distribution", "MaskedDistribution", "mask_of() in _distributions.py reads its `_mask`"),
    ("pyro.ops.packed", "pack", "_tracing/marginal_sites.py names the dimensions of densities by it"),
    ("pyro.poutine.block_messenger", "BlockMessenger", "other_handlers() in _compat.py leaves it out"),
    ("pyro.poutine.trace_messenger", "TraceMessenger", "other_handlers() in _compat.py leaves it out"),
    ("pyro.poutine.markov_messenger", "MarkovMessenger", "markov_step() in _compat.py counts steps by its `_pos`"),
    ("torch._C", "DisableTorchFunction", "_tracing/provenance.py calls operations under it that no mode is to see"),
    ("torch._C", "_DisableTorchDispatch", "NoMode in _compat.py runs checks and known densities under it"),
    ("torch._C", "_set_grad_enabled", "_tracing/known_calls.py knows by it what no_grad() calls"),
    ("torch._C", "_len_torch_dispatch_stack", "only_ours() in _compat.py counts the dispatch modes with it"),
    ("torch._C", "_len_torch_function_stack", "only_ours() in _compat.py counts the function modes with it"),
    ("torch._C", "_is_any_autocast_enabled", "only_ours() in _compat.py asks by it whether operations are cast"),
    ("torch._C", "_get_tracing_state", "only_ours() in _compat.py asks by it whether operations are traced"),
    ("torch._C", "_dispatch_tls_is_dispatch_key_excluded", "is_hidden in _compat.py says by it whether a dispatch mode sees what runs"),
    ("torch._C._functorch", "maybe_current_level", "only_ours() in _compat.py asks by it whether a transformation of torch.func is active"),
    ("torch._C._functorch", "is_functorch_wrapped_tensor", "is_wrapped in _compat.py says by it whether a tensor is one of torch.vmap's"),
    ("torch._C._autograd", "_top_saved_tensors_default_hooks", "only_ours() in _compat.py asks by it whether a function sees saved tensors"),
    ("torch.autograd.forward_ad", "_current_level", "only_ours() in _compat.py asks by it whether there are forward derivatives"),
    ("pyro.distributions.distribution", "DistributionMeta", "CONSTRUCTION in _compat.py wraps its `__call__` while a step is watched"),
    ("pyro.distributions.distribution", "COERCIONS", "_tracing/known_laws.py watches constructors that these may change"),
    ("torch.distributions.Distribution", "_extended_shape", "_tracing/known_densities.py compares it with the one that it knows"),
    ("torch.distributions.independent", "_sum_rightmost", "_tracing/known_densities.py compares it with the one that it knows"),
    ("torch.distributions.bernoulli", "logits_to_probs", "_tracing/known_densities.py compares it with the one that it knows"),
    ("torch.distributions.normal", "broadcast_all", "_tracing/known_laws.py compares it with the one that it knows"),
    ("torch.distributions.Distribution", "_validate_sample", "VALIDATION in _compat.py wraps it while a step is watched"),
    ("torch.utils._python_dispatch.TorchDispatchMode", "_should_skip_dynamo", "Provenance says by it that Dynamo need not be kept out at every operation"),
    ("torch._ops", "OpOverload", "_compile/aten_recorder.py and _compile/scalarization.py know torch's own operations by this type"),
    ("torch.utils._python_dispatch", "TorchDispatchMode", "provenance and recordings see every operation through it"),
    ("torch.utils._python_dispatch", "_disable_current_modes", "black_box() calls the user's function where no mode sees it"),
    ("torch.utils._pytree", "tree_leaves", "_diagnostics/gradient_draws.py finds the tensors among the arguments of an operation with it"),
    ("torch.overrides", "TorchFunctionMode", "_tracing/provenance.py and _compile/aten_recorder.py see values leave the tensors through it"),
    ("pyro.distributions.util", "scale_and_mask", "_tracing/particle_trace.py scales and masks log densities with it as Pyro does"),
    ("pyro.poutine.util", "site_is_subsample", "_tracing/particle_trace.py leaves sites out that Pyro makes for subsampling"),
    ("torch.nn.modules.module", "_global_forward_hooks", "hooks_of_all_modules() in _reuse/probes.py watches hooks of every module"),
    ("torch.nn.modules.module", "_global_forward_pre_hooks", "hooks_of_all_modules() in _reuse/probes.py watches hooks of every module"),
    ("torch.fx.node", "map_aggregate", "_compile/aten_recorder.py goes through the arguments of a recorded operation with it"),
    ("torch.fx.node", "map_arg", "_compile/broadcast_sinking.py goes through the arguments of a node with it"),
    ("torch._inductor.compile_fx", "compile_fx", "compiled_graph() in _compat.py compiles a recorded step with it"),
    ("torch._inductor.custom_graph_pass", "CustomGraphPass", "compiled steps compute nothing twice by such a pass of _compile/broadcast_sinking.py"),
    ("torch._inductor.custom_graph_pass", "get_hash_for_files", "the inductor's cache knows the pass of _compile/broadcast_sinking.py by it"),
    ("torch._inductor.config", "post_grad_custom_pre_pass", "_for_cpu() in _compat.py hands the pass of _compile/broadcast_sinking.py to the inductor"),
    ("torch._inductor.config", "cpp_wrapper", "compiled_graph() in _compat.py lets all kernels run in one call by it"),
    ("torch._inductor.config", "max_fusion_size", "_for_cpu() in _compat.py lets one kernel compute many operations by it"),
    ("torch._inductor.config", "fallback_random", "_for_cpu() in _compat.py lets torch's generator draw many numbers by it"),
    ("torch._dynamo.backends.registry", "lookup_backend", "compiled_graph() in _compat.py finds other backends by name with it"),
    ("torch", "_foreach_copy_", "_compile/cuda_graphs.py copies the inputs of a CUDA graph with it in one kernel"),
    ("torch", "get_autocast_dtype", "settings() in _compat.py compares torch's settings between steps by it"),
    ("torch.Tag", "nondeterministic_seeded", "_compile/aten_recorder.py and _tracing/provenance.py know operations that draw by this tag"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "used"), NAMES, ids=[f"{m}.{n}" for m, n, _ in NAMES])
def test_there_is(module, name, used):
    where = CLASSES[module] if module in CLASSES else importlib.import_module(module)
    assert hasattr(where, name), f"{module}.{name} has moved; {used}."


HOOKS = {
    "register_forward_hook": "_forward_hooks",
    "register_forward_pre_hook": "_forward_pre_hooks",
    "register_full_backward_hook": "_backward_hooks",
    "register_full_backward_pre_hook": "_backward_pre_hooks",
}


@pytest.mark.parametrize("register", HOOKS)
def test_a_module_keeps_its_hooks_where_perceptrons_look(register):
    module = torch.nn.Linear(1, 1)
    getattr(module, register)(lambda *_: None)
    assert getattr(module, HOOKS[register]), (
        f"torch keeps what {register} is given elsewhere than in `{HOOKS[register]}`; Perceptron.is_plain() in _baselines.py reads it."
    )


def test_an_enumerating_handler_keeps_the_depth_of_markov_sites():
    from pyro.poutine.enum_messenger import EnumMessenger

    internals.enumerate_from(-1)
    handler = EnumMessenger()
    with handler:
        for t in pyro.markov(range(2)):
            pyro.sample(f"z{t}", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    assert set(handler._markov_depths) == set(handler._value_dims) == {"z0", "z1"}, (
        "EnumMessenger keeps the markov depths and the dimensions of values elsewhere than in `_markov_depths` and `_value_dims`; "
        "MarginalMessenger in _tracing/marginal_sites.py notes those of sites that are not enumerated."
    )


def test_vectorized_markov_marks_the_steps_that_are_not_counted():
    from pyro.contrib.funsor import vectorized_markov

    with pyro.poutine.trace() as found:
        for t in vectorized_markov(name="time", size=4, dim=-1):
            pyro.sample(f"x{t}", dist.Normal(0.0, 1.0), obs=torch.zeros(4)[t])
    marked = [internals.in_vectorized_markov(site["infer"]) for _, site in found.trace.iter_stochastic_nodes()] + [
        internals.in_vectorized_markov(site["infer"])
        for site in found.trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"]
    ]
    assert any(marked), (
        "pyro.contrib.funsor.vectorized_markov marks the steps that are not counted otherwise than by `_do_not_score`; in_vectorized_markov() in "
        "_compat.py knows it by that, and programs with it would be counted wrongly."
    )


def test_rings_go_back_to_indices():
    from collections import OrderedDict

    from pyro.ops.contract import contract_tensor_tree
    from pyro.ops.rings import MapRing

    x = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    x._pyro_dims = "ab"
    internals.ask_for_indices(x)
    ((found,),) = contract_tensor_tree(
        OrderedDict({frozenset("a"): [x]}), {"b"}, ring=MapRing(dim_to_size={"a": 2, "b": 2})
    ).values()
    ((dims, index),) = internals.indices_back(found, [x], ["b"])
    assert (dims, index.tolist()) == ("a", [1, 0]), (
        "Pyro's rings keep elsewhere than in `_pyro_backward`, `_pyro_backward_result`, `_pyro_sample_dims` and `_pyro_dims` at which values a "
        "maximum or a sample is; indices_back() in _compat.py reads them."
    )


def test_a_masked_distribution_keeps_its_mask():
    from pplgrad.pyro._distributions import mask_of

    mask = torch.tensor([True, False])
    assert torch.equal(mask_of(dist.Bernoulli(torch.ones(2)).mask(mask)), mask), (
        "Pyro's MaskedDistribution keeps its mask elsewhere than in `_mask`; mask_of() in _distributions.py reads it."
    )


def test_the_param_store_holds_leaves_and_constraints():
    pyro.param("s", torch.tensor(2.0), constraint=constraints.positive)
    store = pyro.get_param_store()
    assert type(store._params) is dict and torch.is_tensor(store._params["s"]), (
        "Pyro's param store holds its leaves elsewhere than in the dict `_params`; hide_state() and unconstrained() in _compat.py read it."
    )
    assert internals.constraints() == {"s": constraints.positive}, (
        "Pyro's param store holds its constraints elsewhere than in `_constraints`; constraints() in _compat.py reads them."
    )


def test_hidden_state_is_left_out_of_named_parameters():
    pyro.clear_param_store()
    pyro.param("a", torch.tensor(1.0))
    pyro.param("a$state", torch.tensor(1.0))
    internals.hide_state(["a$state"])
    assert dict(pyro.get_param_store().named_parameters()).keys() == {"a"}, (
        "Pyro's `named_parameters` no longer goes through `_params.items()`; hide_state() in _compat.py leaves state of baselines out there."
    )


def test_an_optimizer_holds_what_was_loaded():
    optimizer = pyro.optim.Adam({"lr": 0.1})
    optimizer.set_state({"a": {"state": {}}})
    assert internals.loaded_state(optimizer), (
        "Pyro's optimizers hold loaded state elsewhere than in `_state_waiting_to_be_consumed`; loaded_state() in _compat.py reads it."
    )


def test_handlers_around_a_step_are_seen():
    with poutine.trace(param_only=True), poutine.block(), poutine.mask(mask=False):
        assert internals.other_handlers() == ["MaskMessenger"], (
            "Pyro's handlers are named or stacked otherwise; other_handlers() reads them."
        )


def test_views_share_the_number_of_their_storage():
    x = torch.zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = x[1:].untyped_storage()._cdata == x.untyped_storage()._cdata
    assert same and torch.zeros(3).untyped_storage()._cdata != x.untyped_storage()._cdata, (
        "UntypedStorage._cdata no longer numbers storages; _tracing/provenance.py and _diagnostics/gradient_draws.py know views of one array by it."
    )


def test_a_write_is_counted():
    x = torch.zeros(3)
    before = x._version
    x.add_(1)
    assert x._version > before, (
        "Tensor._version no longer counts writes; _tracing/provenance.py sees by it that a tensor was changed."
    )


def test_operations_say_what_they_are():
    add, draw, view = torch.ops.aten.add_.Tensor, torch.ops.aten.bernoulli.default, torch.ops.aten.select.int
    assert add._schema.is_mutable and not view._schema.is_mutable, (
        "Schemas no longer say `is_mutable`; writes() in _compile/aten_recorder.py asks them."
    )
    assert add._schema.arguments[0].alias_info.is_write and view._schema.returns[0].alias_info is not None, (
        "Schemas no longer say `alias_info`; _compile/aten_recorder.py and _tracing/provenance.py know writes and views by it."
    )
    assert add._schema.name == "aten::add_", (
        "Schemas no longer have `name`; the rules in _tracing/axes.py go by the names of operations."
    )
    assert torch.Tag.nondeterministic_seeded in draw.tags, (
        "Operations that draw are tagged otherwise; _compile/aten_recorder.py leaves them in place by it."
    )
    axis = next(a for a in torch.ops.aten.sum.dim_IntList._schema.arguments if a.name == "keepdim")
    assert axis.has_default_value() and axis.default_value is False, (
        "Schemas no longer give defaults; _tracing/axes.py reads arguments by them."
    )


def test_modes_see_operations():
    seen = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Operations(), Functions():
        float(torch.ones(()))
        with torch._C.DisableTorchFunction():
            torch.ones(()).exp()
    assert {"__float__", "aten::_local_scalar_dense", "aten::exp"} <= set(seen), (
        "Modes no longer see a value leave a tensor; _tracing/provenance.py counts it as read by all that follows."
    )
    assert "exp" not in seen, (
        "DisableTorchFunction no longer hides calls from a TorchFunctionMode; _tracing/provenance.py calls operations under it."
    )


def test_a_graph_of_derivatives_leads_to_its_leaves():
    x = torch.ones((), requires_grad=True)
    assert internals.leaves_of(x.exp() * 2)[0] is x, (
        "grad_fn no longer leads to leaves by `next_functions` and `variable`; leaves_of() follows it."
    )


def test_modules_hold_their_parts():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert list(module._modules) == ["0"], (
        "Module._modules has moved; _reuse/guards.py watches which modules there are."
    )
    inner = module[0]
    assert "weight" in inner._parameters and "running_mean" in inner._buffers, (
        "Module._parameters and _buffers have moved; _compile/input_sources.py reads them."
    )


def test_distributions_hold_what_they_were_given():
    probs = torch.tensor([0.0, 1.0])
    for given in (dist.Categorical(probs=probs), dist.Bernoulli(probs=probs)):
        assert given._param is given.__dict__.get("probs"), (
            "torch's distributions no longer hold their parameter as `_param`; _never_drawn() in _distributions.py sees by it that probabilities were given."
        )
    assert isinstance(dist.OneHotCategorical(probs=probs)._categorical, torch.distributions.Categorical), (
        "torch's OneHotCategorical no longer holds `_categorical`; _never_drawn() in _distributions.py looks inside."
    )
    mask = torch.tensor([True, False])
    assert dist.Normal(torch.zeros(2), 1.0).mask(mask)._mask is mask, (
        "A masked distribution holds its mask elsewhere; _tracing/relaxations.py reads `_mask`."
    )


@pytest.mark.parametrize("changing", CHANGING, ids=lambda c: f"{c.module}.{c.name}")
def test_classes_whose_attributes_change_at_each_step(changing):
    assert hasattr(importlib.import_module(changing.module), changing.name), (
        f"{changing.module}.{changing.name} has moved; CHANGING in _reuse/known_code.py says which of its attributes steer nothing."
    )


def test_a_bijection_keeps_its_last_pair():
    made = torch.distributions.transforms.ExpTransform(cache_size=1)
    made(torch.zeros(()))
    assert {"_cached_x_y", "_inv"} <= set(vars(made)), (
        "torch's transforms keep their last pair elsewhere than in `_cached_x_y`; _reuse/known_code.py leaves it out of what is compared between steps."
    )


def test_transforms_remember_their_last_pair():
    transform = torch.distributions.ExpTransform(cache_size=1)
    y = transform(x := torch.tensor(0.5))
    assert transform._cached_x_y == (x, y), (
        "Transforms hold their last pair elsewhere; keep_inverse() in _compat.py hands on the inverse."
    )
    internals.keep_inverse(
        torch.distributions.TransformedDistribution(torch.distributions.Normal(0, 1), [transform]), y, z := y.clone()
    )
    assert transform.inv(z) is x


def test_leaves_hold_their_hooks():
    leaf = torch.ones(1, requires_grad=True)
    assert not internals.have_hooks([leaf]), "Tensors hold hooks elsewhere; have_hooks() in _compat.py asks for them."
    leaf.register_post_accumulate_grad_hook(print)
    assert internals.have_hooks([leaf]), "Tensors hold hooks elsewhere; have_hooks() in _compat.py asks for them."


def test_what_makes_a_call_no_longer_ours_is_seen():
    """Each of these could take part in an operation; `only_ours` in _compat.py says so."""

    class Dispatching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def hook(x):
        return x

    answers = []
    with Dispatching():
        assert internals.only_ours() and not internals.only_ours(1) and not internals.is_hidden()
        with internals.WithoutDispatch():
            assert internals.is_hidden()
        with torch.device("cpu"):
            assert not internals.only_ours() and internals.only_ours(1)
        around = (
            Dispatching(),
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.forward_ad.dual_level(),
            torch.autograd.graph.saved_tensors_hooks(hook, hook),
        )
        for context in around:
            with context:
                answers.append(internals.only_ours())
        torch.vmap(lambda x: answers.append(internals.only_ours()) or x)(torch.zeros(2))
        torch.jit.trace(lambda x: answers.append(internals.only_ours()) or x, torch.zeros(2), check_trace=False)
    assert not internals.only_ours() and answers and not any(answers)


RANDOM_CALLS = {
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(torch.ones(3)),
    "randint": lambda: torch.randint(5, (3,)),
    "bernoulli": lambda: torch.bernoulli(torch.full((3,), 0.4)),
    "bernoulli_": lambda: torch.empty(3).bernoulli_(0.4),
    "bernoulli_ of a tensor": lambda: torch.empty(3).bernoulli_(torch.tensor([0.1, 0.4, 0.7])),
    "normal": lambda: torch.normal(torch.ones(3), torch.ones(3)),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "poisson": lambda: torch.poisson(torch.ones(3)),
    "_standard_gamma": lambda: torch._standard_gamma(torch.ones(3)),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(3), 0.5),
    "native_dropout": lambda: torch.native_dropout(torch.ones(3), 0.5, True)[0],
}


@pytest.mark.parametrize("name", RANDOM_CALLS)
def test_noise_is_held_still(name):
    from pplgrad.pyro._rerun.still_noise import StillNoise

    with StillNoise():
        found = [RANDOM_CALLS[name]() for _ in range(4)]
    assert all(torch.equal(x, found[0]) for x in found), (
        f"StillNoise in _rerun/still_noise.py does not hold torch's {name} still: programs that draw by it where values are compared are refused."
    )


def test_markov_tells_its_step():
    assert internals.markov_step() == (None, 0)
    for outer in pyro.markov(range(2)):
        for _ in pyro.markov(range(3)):
            loop, step = internals.markov_step()
            assert step == outer == loop._pos, "pyro.markov no longer keeps the number of its step in `_pos`."
            assert loop._iterable is not None, "pyro.markov no longer keeps what it goes through in `_iterable`."
