"""PEFT layers on linlora's ops: how a layer is converted, how it runs, and whole models of such layers.

linearize        linearize, set_scope, delinearize, accelerate: whole models, in place
finding          the LoRA layers of a model, checked before one is changed
conversion       a layer into a ConvertedLoraLinear and back, by a change of its class
lora_linear      ConvertedLoraLinear: the forward at layer scope and at model scope
adapters         its adapters: plain, short or pair, and the factors that the op takes
layer_merging    its adapters folded into the base weight, and taken out
quantized        the same layer over a quantized base
calls, called    when a layer calls its parts instead of reading their weights, and how it is linearized then
adapter_names    a mixture of adapters for each row: mixtures, mixed_batches
model_scope      the second stream, turned on and off
folding          a linearized adapter as stock LoRA factors; peft_saving, peft_merging, peft_names: PEFT's methods
vanilla          which adapters are plain LoRA, and the reasons for those that are not
weights          sums of W and ΔW, rounded once and taken apart bit by bit
restoring        finish, or leave the model as it was; temporary: changes that last for a block
sharding         weights that lie elsewhere; sharing: that several modules use
report           what was done to which layers
"""
