"""How Numba makes a kernel: its own way, without what kernels and their parts have no use for.

A kernel has more than a hundred parts, *helpers*, each of which goes through Numba's passes for itself: that
is most of the time of a first call. They have no closures, no array expressions, no exceptions, no objects
whose references are counted; they are no generators, and nothing is decided by a literal. So passes that look
for these are left out here, what has been found out about some types is not found out again, and there is no
machine code of a helper: of each only the LLVM code is wanted, to be inlined.

Numba itself, and what others compile with it, go on as they did.
"""

import copy
import functools
from typing import Any

from llvmlite import ir
from numba import _dynfunc
from numba.core import types
from numba.core.callconv import CPUCallConv, Status
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.cpu import CPUContext
from numba.core.interpreter import Interpreter
from numba.core.ir_utils import build_definitions
from numba.core.rewrites.static_getitem import RewriteConstGetitems, RewriteConstSetitems
from numba.core.ssa import reconstruct_ssa
from numba.core.typed_passes import NativeLowering, PreLowerStripPhis
from numba.core.typing import Context
from numba.core.untyped_passes import GenericRewrites, ReconstructSSA, TranslateByteCode
from numba.extending import intrinsic

# --- what Numba knows about types ------------------------------------------------------------------


class _CallConvention(CPUCallConv):
    """Numba's way of calling, where nothing raises: nobody asks how a call ended.

    So there is no place for an exception either, which would be cleared in every round of a loop.
    """

    def call_function(self, builder, callee, resty, argtys, args, attrs=None):
        with builder.goto_entry_block():
            result = builder.alloca(self.get_return_type(resty).pointee)
        no_exception = ir.Constant(callee.args[1].type, None)
        values = self._get_arg_packer(argtys).as_arguments(builder, args)
        code = builder.call(callee, [result, no_exception, *values])
        bit = ir.IntType(1)
        ended = {name: ir.Constant(bit, name == "is_ok") for name in Status._fields if name.startswith("is_")}
        status = Status(code=code, excinfoptr=ir.Constant(no_exception.type.pointee, None), **ended)
        return status, self.context.get_returned_value(builder, resty, builder.load(result))

    def return_status_propagate(self, builder, status):
        """Do nothing."""


def _remembering(method):
    """Return a method that returns what it has returned before, where that was not None."""
    known = {}

    @functools.wraps(method)
    def remembering(self, *args, **kwargs):
        if kwargs:
            return method(self, *args, **kwargs)
        found = known.get(args)
        if found is None:
            found = known[args] = method(self, *args)
        return found

    return remembering


class _Copied:
    """One of Numba's contexts, with a few things done otherwise."""

    @classmethod
    def of(cls, context: Any) -> Any:
        """Return a copy of Numba's own, which shares all that is registered with it."""
        result = copy.copy(context)
        result.__class__ = cls
        return result


class _Operator(types.Callable):
    """What Numba knows about one of Python's operators, which it asks for every time that one is used."""

    def __init__(self, function):
        self._function = function
        self._signatures = {}
        super().__init__(function.name)

    @property
    def key(self):
        return self._function

    def get_call_type(self, context, args, kws):
        found = self._signatures.get(args)
        if found is None:
            found = self._signatures[args] = self._function.get_call_type(context, args, kws)
        return found

    def get_call_signatures(self):
        return self._function.get_call_signatures()

    def get_impl_key(self, sig):
        return self._function.get_impl_key(sig)


def _of_two(order):
    """Return what chooses the one of two integers that is before the other."""

    @intrinsic
    def choose(typingctx, a, b):
        if not types.unliteral(a) == types.unliteral(b) == types.int64:
            return None

        def codegen(context, builder, signature, args):
            return builder.select(builder.icmp_signed(order, *args), *args)

        return types.int64(types.int64, types.int64), codegen

    return choose


# Numba itself compiles a function for each.
_INSTEAD = ((min, _of_two("<")), (max, _of_two(">")))


class _Typing(_Copied, Context):
    """Numba's types of calls, nine in ten of which are of a function and of types that have been before."""

    resolve_getattr = _remembering(Context.resolve_getattr)
    _operator = staticmethod(functools.cache(_Operator))

    def refresh(self) -> None:
        """Do nothing: it shares what Numba's own finds."""

    def resolve_function_type(self, func, args, kws):
        if kws or isinstance(func, str):  # those of Numba's own are of values, not of types alone
            return super().resolve_function_type(func, args, kws)
        return self._resolve(func, args)

    @_remembering
    def _resolve(self, func, args):
        return super().resolve_function_type(func, args, {})

    def resolve_value_type(self, val):
        for function, instead in _INSTEAD:
            if val is function:
                return super().resolve_value_type(instead)
        known = super().resolve_value_type(val)  # which is another one when more has been registered
        if type(known) is not types.Function or val.__module__ != "_operator":
            return known
        return self._operator(known)


_typing = functools.cache(_Typing.of)


class _Target(_Copied, CPUContext):
    """Numba's CPU, for what kernels are made of."""

    @property
    def call_conv(self):
        return _CallConvention(self)


class _HelperTarget(_Target):
    """The same for helpers."""

    get_function = _remembering(_Target.get_function)
    get_getattr = _remembering(_Target.get_getattr)
    get_abi_sizeof = _remembering(_Target.get_abi_sizeof)

    def get_executable(self, library, function, environment):
        """Return what stands for a helper in Numba's tables: a function at no address."""
        return _dynfunc.make_function(
            function.lookup_module(), function.qualname, "", 0, environment, (library,)
        )


class _KnownTarget(_Copied, CPUContext):
    """Numba's CPU as it is when a kernel's helpers are compiled."""

    def refresh(self) -> None:
        """Do nothing: what has been registered since was looked for when the kernel was begun."""


# --- passes ------------------------------------------------------------------------------------------
#
# Several of Numba's end with finding out how long each variable is used, and put its end into the code: for
# references, and for generators.


class _Interpreter(Interpreter):
    def post_process(self, peepholes, func_ir):
        return func_ir


@register_pass(mutates_CFG=True, analysis_only=False)
class _Bytecode(TranslateByteCode):
    """Without what Python's compiler makes of some statements, and Numba's unmakes."""

    _name = "nbbn_bytecode"

    def run_pass(self, state):
        state["func_ir"] = _Interpreter(state["func_id"]).interpret(state["bc"])
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _Rewrites(GenericRewrites):
    """Only of what is looked up by a constant."""

    _name = "nbbn_rewrites"

    def run_pass(self, state):
        blocks = state.func_ir.blocks
        for kind in (RewriteConstGetitems, RewriteConstSetitems):
            rewrite = kind(state)
            for key in blocks:
                while rewrite.match(state.func_ir, blocks[key], None, None):
                    blocks[key] = rewrite.apply()
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _SSA(ReconstructSSA):
    _name = "nbbn_ssa"

    def run_pass(self, state):
        state.func_ir = reconstruct_ssa(state.func_ir)
        state.func_ir._definitions = build_definitions(state.func_ir.blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _Phis(PreLowerStripPhis):
    _name = "nbbn_phis"

    def run_pass(self, state):
        state.func_ir = self._strip_phi_nodes(state.func_ir)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _HelperLowering(NativeLowering):
    """Lowering without machine code: of a helper, only its own LLVM code is wanted, to be inlined."""

    _name = "nbbn_helper_lowering"

    def run_pass(self, state):
        library = state.library = state.targetctx.codegen().create_library(state.func_id.func_qualname)

        def finalize_without_code():
            for function in library._final_module.functions:
                if not function.is_declaration:
                    function.linkage = "linkonce_odr"
            library._shared_module = library._final_module
            library._finalized = True

        library.finalize = finalize_without_code
        library._optimize_functions = lambda module: None
        return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class _KernelLowering(NativeLowering):
    """Lowering of a kernel, which links all the helpers that it calls, and those that they call."""

    _name = "nbbn_kernel_lowering"

    def run_pass(self, state):
        library = state.library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
        library.enable_object_caching()
        linked = set()

        def link(part):
            if part in linked:
                return
            linked.add(part)
            part._ensure_finalized()
            # The caller first: of linkonce_odr functions, only those that are called are linked in.
            library._linking_libraries.append(part)
            for called in part._linking_libraries:
                link(called)

        library.add_linking_library = link
        return super().run_pass(state)


_REPLACED = {
    TranslateByteCode: _Bytecode,
    GenericRewrites: _Rewrites,
    ReconstructSSA: _SSA,
    PreLowerStripPhis: _Phis,
}
_LEFT_OUT = frozenset(
    {
        "IRProcessing",
        "AnnotateTypes",
        "WithLifting",
        "InlineClosureLikes",
        "RewriteSemanticConstants",
        "DeadBranchPrune",
        "RewriteDynamicRaises",
        "MakeFunctionToJitFunction",
        "InlineInlinables",
        "FindLiterallyCalls",
        "LiteralUnroll",
        "LiteralPropagationSubPipelinePass",
        "InlineOverloads",
        "NopythonRewrites",
        "NoPythonSupportedFeatureValidation",
        "DumpParforDiagnostics",
        "IRLegalization",
    }
)


# --- the two pipelines -------------------------------------------------------------------------------


class _Passes(PassManager):
    """Numba's passes, one after the other, without its events, timers and looks at what they leave."""

    def _runPass(self, index, step, state):
        step.analysis = self._analysis
        step.run_initialization(state)
        step.run_pass(state)
        step.run_finalizer(state)


_pipelines: dict[type, _Passes] = {}


class _Compiler(CompilerBase):
    """Numba's own pipeline for another target, some of its passes replaced, and without those left out."""

    target: type[_Target]
    lowering: type[NativeLowering]

    def __init__(self, typing, target, *rest):
        super().__init__(_typing(typing), target, *rest)
        self.state.targetctx = self.target.of(self.state.targetctx)
        self.state.targetctx.typing_context = self.state.typingctx

    def define_pipelines(self):
        kind = type(self)
        if kind not in _pipelines:
            _pipelines[kind] = self._passes()
        return [_pipelines[kind]]

    def _passes(self):
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        instead = {**_REPLACED, NativeLowering: self.lowering}
        passes.__class__ = _Passes
        passes.passes = [
            (instead.get(step, step), text) for step, text in passes.passes if step.__name__ not in _LEFT_OUT
        ]
        passes.finalize()
        return passes


class HelperCompiler(_Compiler):
    """What compiles helpers."""

    target = _HelperTarget
    lowering = _HelperLowering

    def __init__(self, typing, target, *rest):
        super().__init__(typing, _KnownTarget.of(target), *rest)


class KernelCompiler(_Compiler):
    """What compiles kernels."""

    target = _Target
    lowering = _KernelLowering
