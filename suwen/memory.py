"""What a training step needs, part by part, before anything is downloaded or launched.

Parameters are counted on a model without data (torch's meta device), so that they are exact for every family. Bytes of
the parts follow from what this toolkit's trainers do:

- weights: float32 where they are trained (bfloat16 with `pure_bf16`), the compute precision where LoRA freezes them;
  int8 with a float32 scale a row (LLM.int8, arXiv:2208.07339), NF4 with double quantisation at 4 + 8/64 + 32/(64*256)
  bits (QLoRA, arXiv:2305.14314), 2 bits with 16-bit scale and zero point in groups of 64. Only `nn.Linear` outside the
  head is quantised: embeddings, head and the stacked experts of MoE models keep the compute precision.
- gradients in the precision of what is trained; AdamW's two moments beside them.
- autocast keeps a 16-bit copy of every trained float32 matrix from its first use to the end of the backward pass.
- activations: what autograd saves, layer by layer, in a pre-norm decoder with rotary positions and a gated MLP; see
  `layer_bytes_per_token`. With gradient checkpointing one hidden state a layer, and all of one layer while it is
  recomputed.
- the head makes the logits of the scored positions, some rows at a time (`suwen.head`), never all of them.
- pairs: DPO's reference is computed before the first step and kept as numbers; ORPO has none; a reward model's head is
  one row. PPO: the critic, and the reference of a new adapter, stand on the policy's backbone and cost nothing; where
  other weights are trained the reference is a copy of these; reward models stand beside them; answers are drawn with
  a cache of keys and values.

The peak is the largest of these moments: the start of the backward pass (all activations, the head's tiles), the
recomputation of a layer, its end (all gradients), and in PPO the drawing of answers. Sharding follows ZeRO (Rajbhandari
et al. 2020, arXiv:1910.02054). The allocator's rounding and fragmentation come on top on GPUs as one allowance, a line
of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from suwen.attention import SHORT
from suwen.head import chunk_rows
from suwen.lora import MOST_BY_PLACE

HEAD_COPIES = 1  # of a chunk of logits, in float32: log-probabilities and slopes take their place
DRAWING_COPIES = 3  # of the next tokens' logits: themselves, as they are filtered, their probabilities
POLICY_HEAD_COPIES = 6  # in PPO also the entropy's, and what autograd keeps of them
PAIRED = ("dpo", "orpo", "rm")  # stages whose rows are pairs of answers
SAFE_SHARE = 0.9  # of a device's free memory that a plan may take: it is within a tenth of what was measured
DIVIDING = ("zero3", "fsdp2")  # what divides the weights between the processes
QUANTIZED_BITS = {"8bit": 8.0, "4bit": 4 + 8 / 64 + 32 / (64 * 256), "2bit": 2 + 2 * 16 / 64}
CODES = {"none": 0, "8bit": 8, "4bit": 4, "2bit": 2}  # of these bits, those of the weights themselves
FRAGMENTATION = 0.05  # of all allocated bytes, on GPUs
CONTEXT_BYTES = 600_000_000  # CUDA context and libraries' work space, a process


def _decoder(
    kind: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, **more: int
) -> dict[str, Any]:
    return {"model_type": kind, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, **more}  # fmt: skip


# Sizes that people call by name: LLaMA, LLaMA-2-70B, Qwen1.5-110B and Mixtral; and models
SIZES = {
    "7B": _decoder("llama", 32000, 4096, 11008, 32, 32),
    "13B": _decoder("llama", 32000, 5120, 13824, 40, 40),
    "30B": _decoder("llama", 32000, 6656, 17920, 60, 52),
    "70B": _decoder("llama", 32000, 8192, 28672, 80, 64, num_key_value_heads=8),
    "110B": _decoder("qwen2", 152064, 8192, 49152, 80, 64, num_key_value_heads=8),
    "8x7B": _decoder("mixtral", 32000, 4096, 14336, 32, 32, num_key_value_heads=8, num_local_experts=8),
    "8x22B": _decoder("mixtral", 32768, 6144, 16384, 56, 48, num_key_value_heads=8, num_local_experts=8),
    "LLaMA3-8B": _decoder("llama", 128256, 4096, 14336, 32, 32, num_key_value_heads=8),
    "Qwen2.5-7B": _decoder("qwen2", 152064, 3584, 18944, 28, 28, num_key_value_heads=4),
    "Qwen3-8B": _decoder("qwen3", 151936, 4096, 12288, 36, 32, num_key_value_heads=8, head_dim=128),
    "Baichuan-13B": {"model_type": "baichuan"},
    "Baichuan2-13B": {"model_type": "baichuan", "vocab_size": 125696},
    "BLOOMZ-7B1": _decoder("bloom", 250880, 4096, 16384, 30, 32),
    "ChatGLM-6B": {"model_type": "chatglm"},
}


def refuse_divided(quantization: str, sharding: str, flag: str = "--quantization") -> None:
    """FSDP2 leaves NF4 weights whole on every card; all else that divides weights cannot hold quantised ones.

    DeepSpeed's ZeRO-3 and transformers exclude each other where weights are quantised while they are loaded; FSDP2
    takes the codes' classes away from int8 weights, and knows nothing of two bits.
    """
    if quantization != "none" and sharding in DIVIDING and (quantization, sharding) != ("4bit", "fsdp2"):
        raise ValueError(
            f"{flag} {quantization}: found CONFIG={sharding}, which divides weights between the processes, and"
            " quantised ones it cannot divide; use CONFIG=ddp, or leave the flag out"
        )


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a step; the names are those of the stages' flags.

    Attributes:
        tokens: of the longest sequence; of the longest answer with its prompt where rows are pairs.
        batch: sequences in a micro-batch (pairs are two sequences). PPO computes packs of `tokens` one at a time.
        precision: bf16, fp16 or fp32, of the arithmetic.
        sharding: none, ddp, zero1, zero2, zero3 or fsdp2.
        row_tokens: of the longest row, which is what PPO draws at once; 0 where it may fill a sequence.
        trained_share: share of the tokens that have a loss.
        generation_batch: answers that a process draws at once (PPO).
        offload: whether the optimizer, the float32 masters and ZeRO-2's and ZeRO-3's gradients are in main memory.
        offload_weights: whether the weights are there too, and come to the card layer by layer.
        new_adapter: whether LoRA's adapter is new, so that the reference is the model without it (PPO).
        reward_bytes: of reward models beside the policy (PPO).
    """

    stage: str = "sft"
    use_peft: bool = False
    lora_rank: int = 8
    lora_dropout: float = 0.05
    quantization: str = "none"
    precision: str = "bf16"
    pure_bf16: bool = False
    tokens: int = 1024
    batch: int = 1
    gradient_accumulation_steps: int = 8
    gradient_checkpointing: bool = True
    optim: str = "adamw_torch"
    sharding: str = "none"
    num_gpus: int = 1
    offload: bool = False
    offload_weights: bool = False
    device: str = "cuda"
    row_tokens: int = 0
    trained_share: float = 1.0
    generation_batch: int = 32
    new_adapter: bool = True
    reward_bytes: float = 0.0

    @property
    def sequence_tokens(self) -> int:
        """Tokens in a micro-batch: a pair is two sequences, in one pass."""
        if self.stage == "ppo":
            return self.tokens
        return self.tokens * self.batch * (2 if self.stage in PAIRED else 1)

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory: counts of parameters, and widths of its layers."""

    total: int
    embedding: int
    head: int  # 0 where it is the embedding
    linear: int  # in nn.Linear outside the head: what is quantised
    experts: int  # in stacked 3-D tensors
    rows: int  # of all these matrices together, each with one scale in int8
    largest: int  # parameters of the largest quantised matrix
    largest_layer: int
    lora_features: int  # sum of inputs and outputs of all adapted matrices: times the rank
    layers: int
    hidden: int
    heads: int
    query: int
    key_value: int
    inner: int  # width of the MLP that one token passes
    vocabulary: int
    readers: int  # projections of a layer that read its hidden states: queries, keys, values, gate and up
    gated: bool  # whether the MLP has a gate beside its way up
    layer_norms: bool  # torch's own, which keep one input, where RMSNorm keeps its steps
    eager: bool  # attention in plain products, which keeps the scores of all pairs of tokens
    bias_heads: int  # heads of a bias for all pairs of tokens that each layer makes and keeps
    padded: bool  # whether rows cannot be kept apart one behind another, so that they stand side by side


def shape_of(config: Any, target_modules: str = "all", attn_implementation: str | None = None) -> Shape:
    """Count a model by its config, without data.

    Args:
        target_modules: what LoRA adapts, see `suwen.lora_targets`.
        attn_implementation: asked for; None for the model's own.

    Raises:
        ValueError: a config of no causal language model, or a target that it does not have.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from suwen.lora_targets import lora_targets

    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}") from None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    named = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    linears, targets = list(named.values()), set(lora_targets(model, target_modules))
    adapted = [m for name, m in named.items() if name.rsplit(".", 1)[-1] in targets]
    experts = [p for p in model.parameters() if p.ndim == 3]
    stacks = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    stacked = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    heads = getattr(text, "num_attention_heads", 1)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value = size * (getattr(text, "num_key_value_heads", None) or heads)
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention expands keys and values to all heads
        size = text.qk_nope_head_dim + text.qk_rope_head_dim
        key_value = heads * (size + text.v_head_dim) // 2
    inner = getattr(text, "intermediate_size", None) or getattr(text, "inner_hidden_size", None) or 4 * text.hidden_size
    if active := getattr(text, "num_experts_per_tok", None):
        one = getattr(text, "moe_intermediate_size", None) or inner
        shared = getattr(text, "shared_expert_intermediate_size", None) or one * (
            getattr(text, "n_shared_experts", 0) or 0
        )
        inner = active * one + shared
    each = [m for layer in stacked for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    up = sum(m.out_features // inner for m in each if m.out_features % inner == 0)  # two in one where they are fused
    down = sum(m.in_features == inner for m in each)
    return Shape(
        total=sum(p.numel() for p in model.parameters()),
        embedding=embedding.weight.numel(),
        head=0 if tied else head.weight.numel(),
        linear=sum(m.weight.numel() for m in linears),
        experts=sum(p.numel() for p in experts),
        rows=sum(m.weight.shape[0] for m in linears),
        largest=max((m.weight.numel() for m in linears), default=0),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in stacked),
        lora_features=sum(sum(m.weight.shape) for m in adapted),
        layers=len(stacked),
        hidden=text.hidden_size,
        heads=heads,
        query=size * heads,
        key_value=key_value,
        inner=inner,
        vocabulary=embedding.weight.shape[0],
        # all but those behind attention and MLP
        readers=5 if experts else min(5, max(2, round(len(each) / len(stacked)) - 2)),
        gated=bool(experts) or up > down,
        layer_norms=any(isinstance(m, torch.nn.LayerNorm) for m in stacked[0].modules()),
        eager=model.config._attn_implementation == "eager",
        bias_heads={"baichuan": heads, "chatglm": 1}.get(text.model_type, 0),
        padded=text.model_type in ("bloom", "chatglm"),
    )


def layer_bytes_per_token(shape: Shape, setting: Setting) -> int:
    """Bytes that autograd saves for one token in one layer.

    h is the hidden width, q that of all queries, k of all keys, f of the MLP; e the bytes of a number in arithmetic:

    - norms: their float32 input, twice h; with trained weights also the normalised input of RMSNorm, twice h;
    - inputs of the projections: trained in float32 one for q, k, v and one for gate, up (2h); under autocast a copy for
      each of the five (5h e), or of as many as there are where some are one; with LoRA one for q, k, v, one for the
      output, one for gate, up and one for the last, e, and with its dropout the places that are dropped (8 bytes each),
      of many a mask (1 byte on a GPU, e on a CPU); under ZeRO-3 one and a mask for each of the seven;
    - attention: q, k, v and its result, e (2q + 2k); of short segments in bfloat16 on a CPU also the probabilities;
      scores or a bias for all pairs of tokens where the model keeps them, see `pair_bytes`;
    - the gated MLP: gate, its activation, up and, where the last projection is trained or adapted, their product;
      without a gate, up and its activation.
    """
    h, q, k, f, e = shape.hidden, shape.query, shape.key_value, shape.inner, setting.compute_bytes
    saved = 4 * 2 * h + e * (2 * q + 2 * k) + e * (3 if shape.gated else 1) * f + pair_bytes(shape, setting)[0]
    if setting.device == "cpu" and setting.precision == "bf16" and not (shape.eager or shape.bias_heads):
        saved += e * shape.heads * min(SHORT, setting.row_tokens or setting.tokens)
    if not setting.use_peft:
        normalised = 0 if shape.layer_norms else 4 * 2 * h
        return saved + normalised + (4 * 2 * h if e == 4 else e * shape.readers * h) + e * f
    p, masks = setting.lora_dropout, 0.0 if not setting.lora_dropout else 1.0 if setting.device == "cuda" else e
    beside = int8_inputs(shape, setting) if p else 0  # else LoRA keeps the same tensors
    if setting.sharding == "zero3":
        return saved + beside + round((e + masks) * (shape.readers * h + q + f))
    dropped = -8 * math.log1p(-p) if p <= MOST_BY_PLACE else masks
    return saved + beside + round((e + dropped) * (2 * h + q + f))


def int8_inputs(shape: Shape, setting: Setting) -> int:
    """Bytes of a token's inputs of one layer's projections, which bitsandbytes keeps beside autograd in int8.

    Gradient checkpointing does not see them: they stay for all layers.
    """
    kept = 2 * shape.hidden + shape.query + shape.inner
    return kept * setting.compute_bytes if setting.quantization == "8bit" else 0


def pair_bytes(shape: Shape, setting: Setting) -> tuple[int, int]:
    """Bytes for one token in one layer that grow with the row: of its pairs with all tokens of the row, in all heads.

    A row is a whole micro-batch where rows stand one behind another.

    Returns:
        What autograd saves: eager attention's probabilities in float32, and in 16 bits where that is the arithmetic;
        or a bias of the arithmetic's precision. And what lies beside it while it is made or worked back: the scores,
        their sum with the mask and, where they are not kept anyway, the probabilities that the layer before returned;
        or the bias in float32 and its copy in 16 bits.
    """
    e, rounded = setting.compute_bytes, 2 if setting.compute_bytes == 2 else 0
    tokens = setting.tokens if shape.padded else setting.sequence_tokens
    if shape.eager:
        returned = e if setting.gradient_checkpointing else 0
        return (4 + rounded) * shape.heads * tokens, (8 + returned) * shape.heads * tokens
    return e * shape.bias_heads * tokens, (4 + rounded) * shape.bias_heads * tokens


@dataclass
class Plan:
    """Bytes of one process, by part.

    Attributes:
        parts: name -> bytes at the moment of the peak, the largest first.
        moment: which moment is the peak.
        notes: assumptions worth knowing.
    """

    parts: dict[str, float]
    moment: str
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def plan_memory(shape: Shape, setting: Setting) -> Plan:
    """Peak of a training step on each GPU (or on the CPU)."""
    if setting.stage == "rm":  # no head but a row
        shape = dataclasses.replace(shape, total=shape.total - shape.head, head=0)
    e, deepspeed = setting.compute_bytes, setting.sharding.startswith("zero")
    trained = shape.lora_features * setting.lora_rank if setting.use_peft else shape.total
    full16 = setting.pure_bf16 or (deepspeed and e == 2)
    trained_bytes = 2 if full16 else 4
    n = setting.num_gpus
    shard_optimizer = n if setting.sharding in ("zero1", "zero2", "zero3", "fsdp2") else 1
    shard_gradients = n if setting.sharding in ("zero2", "zero3", "fsdp2") else 1
    shard_weights = n if setting.sharding in DIVIDING else 1
    kept_on_card = 0 if setting.offload_weights else 1 / shard_weights

    fixed: dict[str, float] = {}
    notes: list[str] = []
    if setting.use_peft:
        frozen, metadata = frozen_bytes(shape, setting)
        codes = shape.linear * CODES[setting.quantization] / 8  # no engine divides them
        fixed["frozen weights"] = codes + (frozen - codes) * kept_on_card
        fixed["quantisation constants"] = metadata
        fixed["adapters"] = trained * trained_bytes
        if setting.quantization != "none" and shape.experts:
            notes.append("experts are stacked tensors, which are not quantised: they stay in 16 bits")
    else:
        fixed["weights"] = trained * trained_bytes * kept_on_card
    if deepspeed and e == 2 and not setting.offload:
        fixed["float32 masters"] = 4 * trained / shard_optimizer
    if not setting.offload:
        fixed["optimizer"] = optimizer_bytes(setting.optim, full16 and not deepspeed) * trained / shard_optimizer
    if setting.stage == "ppo":
        if not (setting.use_peft and setting.new_adapter):
            fixed["reference"] = trained * trained_bytes * kept_on_card
        fixed["reward models"] = setting.reward_bytes
    gathered = 2 * shape.largest_layer * e if kept_on_card < 1 else 0.0
    gradients = trained * trained_bytes / shard_gradients
    if setting.offload and setting.sharding in ("zero2", "zero3"):  # on the card only on their way
        widest = max(shape.largest_layer, shape.embedding, shape.head)
        gradients = min(gradients, (trained / shape.layers if setting.use_peft else widest) * trained_bytes)
    buckets = trained * trained_bytes if setting.sharding == "ddp" and n > 1 else 0.0
    kept = setting.gradient_accumulation_steps > 1 or buckets > 0

    tokens = setting.sequence_tokens
    layer = tokens * layer_bytes_per_token(shape, setting)
    residual = tokens * shape.hidden * (e if setting.use_peft or full16 else 4)
    # The 16-bit copies that autocast makes of trained float32 matrices, outside the head.
    copies = (
        0.0 if trained_bytes == 2 or e == 4 else 2.0 * (trained if setting.use_peft else shape.linear + shape.experts)
    )
    copies_in_layer = copies / shape.layers if setting.gradient_checkpointing else 0.0
    if setting.gradient_checkpointing:
        copies = 0.0
    stored = shape.layers * (
        residual + tokens * int8_inputs(shape, setting) if setting.gradient_checkpointing else layer
    )
    head = head_bytes(shape, setting)
    # Gradients that flow through the widest place of a layer while it is worked back; where LoRA's third one comes, the
    # input of the last projection is gone
    flowing = tokens * ((2 if setting.use_peft else 3) * shape.inner * e + 2 * shape.hidden * 4)
    # While scores or a bias are made nothing of the layer's MLP is there
    pairs = tokens * (pair_bytes(shape, setting)[1] - (3 if shape.gated else 2) * shape.inner * e)
    dequantised = shape.largest * e if setting.quantization != "none" else 0.0

    during = gradients if kept else 0.0
    one = layer if setting.gradient_checkpointing else 0.0
    backwards = {"gradients": during, "activations": stored + one, "16-bit copies of weights": copies + copies_in_layer}
    backwards["work space of a layer"] = max(flowing, pairs) + dequantised
    moments = {
        "start of the backward pass": {
            "gradients": during,
            "activations": stored,
            "16-bit copies of weights": copies,
            "loss head": head,
        },
        "recomputation of a layer": backwards,
        "end of the backward pass": {**backwards, "gradients": gradients, "activations": residual + one},
    }
    if setting.stage == "ppo":
        moments["drawing of answers"] = drawing_bytes(shape, setting)
    moment, moving = max(moments.items(), key=lambda item: sum(item[1].values()))
    parts = {**fixed, **moving, "gathered layers": gathered, "gradient buckets": buckets}
    if setting.device == "cuda":
        parts["fragmentation allowance"] = FRAGMENTATION * sum(parts.values())
        parts["CUDA context"] = CONTEXT_BYTES
    ordered = {name: size for name, size in sorted(parts.items(), key=lambda item: -item[1]) if size > 0}
    return Plan(ordered, moment, notes)


def frozen_bytes(shape: Shape, setting: Setting) -> tuple[float, float]:
    """Bytes of a frozen base and of its quantisation constants."""
    e = setting.compute_bytes
    if setting.quantization == "none":
        return float(shape.total * e), 0.0
    bits = QUANTIZED_BITS[setting.quantization]
    codes = CODES[setting.quantization]
    constants = shape.linear * (bits - codes) / 8 + (4.0 * shape.rows if setting.quantization == "8bit" else 0.0)
    return shape.linear * codes / 8 + (shape.total - shape.linear) * e, constants


def drawing_bytes(shape: Shape, setting: Setting) -> dict[str, float]:
    """What it takes to draw answers: keys and values of all tokens so far, and the logits of the next ones."""
    e, rows = setting.compute_bytes, setting.generation_batch
    tokens = rows * (setting.row_tokens or setting.tokens)
    copied = 2.0 * shape.total if e == 2 and not setting.use_peft and not setting.pure_bf16 else 0.0
    return {
        "cache of keys and values": 2.0 * shape.layers * tokens * shape.key_value * e,
        "16-bit copies of weights": copied,
        "work space of a layer": tokens * (3 * shape.inner * e + 2 * shape.hidden * 4)
        + rows * shape.vocabulary * 4.0 * DRAWING_COPIES,
    }


def optimizer_bytes(optim: str, in_16_bits: bool) -> int:
    """Bytes a trained parameter: AdamW's two moments in the parameter's precision, or in 8 bits."""
    if optim.endswith("8bit"):
        return 2
    if optim == "sgd":
        return 0
    return 4 if in_16_bits else 8


def head_bytes(shape: Shape, setting: Setting) -> float:
    """Work space of the loss: hidden states and their slopes, a chunk of logits, gradients of a trained head."""
    if setting.stage == "rm":  # one score an answer, from the last hidden states
        return setting.sequence_tokens * shape.hidden * (4.0 if setting.use_peft else 8.0)
    scored, e = setting.sequence_tokens * setting.trained_share, setting.compute_bytes
    copies = POLICY_HEAD_COPIES if setting.stage == "ppo" else HEAD_COPIES
    rows = min(scored, chunk_rows(shape.vocabulary, setting.device if setting.stage != "ppo" else None))
    rounded = e if e == 2 else 0  # the head's own output, and later the slopes for its products
    chunk = rows * shape.vocabulary * (copies * 4 + rounded)
    hidden = 3 * scored * shape.hidden * e
    last_norm = setting.sequence_tokens * shape.hidden * (4 if setting.use_peft else 8)
    weight = 0.0 if setting.use_peft else 4.0 * shape.vocabulary * shape.hidden
    copy = shape.vocabulary * shape.hidden * e if e == 2 and not setting.use_peft else 0
    return chunk + hidden + last_norm + weight + copy


# Advice


@dataclass(frozen=True)
class Outlook:
    """A run as it was planned, and the memory that it has."""

    shape: Shape
    setting: Setting
    capacity: float  # bytes free to a process
    where: str  # whose they are, for people

    def changed(self, **changes: Any) -> Outlook:
        return dataclasses.replace(self, setting=dataclasses.replace(self.setting, **changes))

    def total(self, **changes: Any) -> float:
        return plan_memory(self.shape, dataclasses.replace(self.setting, **changes)).total

    def fits(self, **changes: Any) -> bool:
        return self.total(**changes) <= SAFE_SHARE * self.capacity

    def advice(self) -> str:
        """One line: whether it fits, and which flags would make it fit."""
        advice = advise(self.shape, self.setting, SAFE_SHARE * self.capacity)
        return f"{amount(self.capacity)} {self.where}, {SAFE_SHARE:.0%} of them to be used; {advice}"


def batch_field(setting: Setting) -> tuple[str, str]:
    """What of a setting is its batch size, and the flag for it: in PPO that of the answers drawn at once."""
    if setting.stage == "ppo":
        return "generation_batch", "generation_batch_size"
    return "batch", "per_device_train_batch_size"


def possible_settings(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Settings that run, each with the flags that give it, from what costs least in speed and quality."""
    change = dataclasses.replace
    said: list[str] = []
    if not setting.gradient_checkpointing:
        setting = change(setting, gradient_checkpointing=True)
        said.append("--gradient_checkpointing True")
        yield said[0], setting
    field_name, flag = batch_field(setting)
    smaller = [8, 1] if setting.stage == "ppo" else [1]
    for size in (size for size in smaller if size < getattr(setting, field_name)):
        said = [words for words in said if flag not in words]
        more = {}
        said.append(f"--{flag} {size}")
        if field_name == "batch":  # as many rows in a step as before
            more = {"gradient_accumulation_steps": setting.gradient_accumulation_steps * setting.batch}
            said.append(f"--gradient_accumulation_steps {more['gradient_accumulation_steps']}")
        setting = change(setting, **{field_name: size}, **more)
        yield " ".join(said), setting
    divides = setting.num_gpus > 1 and setting.sharding not in DIVIDING and setting.quantization == "none"
    for sharding in [name for name in ("zero2", "zero3") if divides and name != setting.sharding]:
        yield " ".join([f"CONFIG={sharding}", *said]), change(setting, sharding=sharding)
    if not setting.use_peft:
        if setting.precision == "bf16":
            yield " ".join([*said, "--pure_bf16 True"]), change(setting, pure_bf16=True)
        setting = change(setting, use_peft=True, pure_bf16=False)
        said.append("--use_peft True")
        yield " ".join(said), setting
        if divides:
            yield " ".join(["CONFIG=zero3", *said]), change(setting, sharding="zero3")
    # Quantised weights are whole on every card
    whole = ["CONFIG=ddp"] if setting.sharding in DIVIDING or setting.offload_weights else []
    quantised = change(setting, sharding="ddp", offload=False, offload_weights=False) if whole else setting
    kinds = [*QUANTIZED_BITS]
    for kind in kinds[kinds.index(setting.quantization) + 1 :] if setting.quantization in kinds else kinds:
        yield " ".join([*whole, *said, f"--quantization {kind}"]), change(quantised, quantization=kind)
    if setting.device == "cuda" and setting.stage != "ppo":
        back = ["--quantization none"] if setting.quantization != "none" else []
        last = change(setting, sharding="zero3", offload=True, offload_weights=True, quantization="none")
        yield " ".join(["CONFIG=zero3_offload", *said, *back]), last


def cheaper_settings(shape: Shape, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Those of the settings that run which need less than all before them."""
    least = plan_memory(shape, setting).total
    for flags, cheaper in possible_settings(setting):
        if (total := plan_memory(shape, cheaper).total) < least:
            yield flags, cheaper
            least = total


def smaller_settings(shape: Shape, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Cheaper settings, then rows of half the tokens, again and again, under the cheapest of them."""
    said, last = "", setting
    for said, last in cheaper_settings(shape, setting):
        yield said, last
    tokens = setting.tokens // 2
    while tokens >= 64:
        yield f"{said} --max_length {tokens}".strip(), dataclasses.replace(last, tokens=tokens)
        tokens //= 2


def largest_batch(shape: Shape, setting: Setting, capacity: float) -> int:
    """The largest micro-batch (in PPO: answers drawn at once) whose peak stays within `capacity`; 0 if none does."""
    name, _ = batch_field(setting)

    def fits(size: int) -> bool:
        return plan_memory(shape, dataclasses.replace(setting, **{name: size})).total <= capacity  # type: ignore[arg-type]

    low, high = 0, 1
    while high <= 4096 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def advise(shape: Shape, setting: Setting, capacity: float) -> str:
    """One line: what fits into `capacity` bytes, and with which flags."""
    size = f"{capacity / 1e9:g} GB" if capacity % 1e8 == 0 else amount(capacity)
    if plan_memory(shape, setting).total <= capacity:
        return f"fits into {size}; largest --{batch_field(setting)[1]} {largest_batch(shape, setting, capacity)}"
    for flags, cheaper in smaller_settings(shape, setting):
        if (total := plan_memory(shape, cheaper).total) <= capacity:
            batch = largest_batch(shape, cheaper, capacity)
            host = f", {amount(host_bytes(shape, cheaper))} in main memory" if cheaper.offload else ""
            return f"does not fit into {size}; fits with {flags}: {total / 1e9:.2f} GB, batch up to {batch}{host}"
    return f"does not fit into {size} with any setting; more cards or a smaller model"


def host_bytes(shape: Shape, setting: Setting) -> float:
    """What all processes together keep in main memory: float32 masters, moments and gradients, and weights if asked."""
    trained = shape.lora_features * setting.lora_rank if setting.use_peft else shape.total
    state = (4 + 4 + optimizer_bytes(setting.optim, False)) * trained
    return float(state + (shape.total * setting.compute_bytes if setting.offload_weights else 0))


def out_of_memory_advice(outlook: Outlook) -> str:
    """One line for a run that ran out of memory: what to lower, and by how much.

    The plan was too low, or the memory was not all there: what is proposed needs a tenth less than was planned at
    least, and fits.
    """
    shape, setting = outlook.shape, outlook.setting
    plan = plan_memory(shape, setting)
    limit = min(SAFE_SHARE * outlook.capacity, 0.9 * plan.total)
    largest = ", ".join(f"{name} {amount(size)}" for name, size in list(plan.parts.items())[:2])
    found = f"planned {amount(plan.total)} ({largest}) of {amount(outlook.capacity)} {outlook.where}"
    for flags, cheaper in smaller_settings(shape, setting):
        total = plan_memory(shape, cheaper).total
        if total <= limit:
            return f"{found}; {flags} needs {amount(total)}, {amount(plan.total - total)} less"
    return f"{found}; no setting of this model needs much less: take a smaller model, or more or larger cards"


def amount(size: float) -> str:
    """Bytes for people: GB (10^9), or MB where that would be nothing."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def describe(plan: Plan) -> list[str]:
    """A table of the parts for people."""
    lines = [f"  {name:<26}{amount(size):>12}" for name, size in plan.parts.items()]
    lines.append(f"  {'peak':<26}{amount(plan.total):>12}  ({plan.moment})")
    return lines + [f"  note: {note}" for note in plan.notes]
