"""GLM-5.1 as pure functions on arrays, to be read in this order:

    config   sizes, and the engines' conventions as data
    weights  matrices as the file stores them, and the product with one
    norm     RMSNorm and LayerNorm
    rope     rotary positions on interleaved pairs
    dsa      the indexer: which earlier tokens a query looks at
    mla      attention over a latent of 512 + 64 numbers a token
    mlp      SwiGLU
    moe      router, experts, shared expert
    block    one decoder layer: h += attention, h += mlp
    mtp      the block that guesses the token after the next
    glm      embedding, layers, head: logits, trace, generate

Around it: cache (what a token leaves behind), tap (who hears the activations), tokenizer, chat, sampling, perplexity.

Arrays are tokens first: T query tokens, S key tokens, H heads, D hidden, E experts, K chosen, V vocabulary.
They are float32, or float64 for the truth that bounds are measured against: a function computes in the type
that it is given.
"""
