"""Options of runs so small that they are taken a hundred times."""

BATCH = 8
TINY = [
    "name=case",
    "data.url=none",
    "data.flip=true",
    f"training.global_batch_size={BATCH}",
    "training.steps=2",
]
DENOISER = [
    "model.base_channels=8",
    "model.groups=4",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[4]",
    "schedule.num_steps=10",
    "sampling.steps=4",
]
DIT = [
    "model.depth=2",
    "model.hidden_size=16",
    "model.heads=2",
    "schedule.num_steps=10",
    "sampling.steps=4",
]
AUTOENCODER = [
    "task=autoencoder",
    "autoencoder.base_channels=8",
    "autoencoder.groups=4",
    "autoencoder.channel_mults=[1,2]",
    "autoencoder.blocks_per_level=1",
    "autoencoder.middle_attention=true",
    "autoencoder.gradient_difference_weight=0.5",
]
ADVERSARY = ["autoencoder.discriminator_from_step=1", "autoencoder.discriminator_channels=8"]
TEXT = [
    "text.encoder=transformer",
    "text.length=6",
    "text.width=8",
    "text.depth=1",
    "text.heads=2",
]
TRANSFORMER = ["model.transformer_depth=1", "text.pooled=false"]  # as in Stable Diffusion
BF16 = "training.precision=bf16_weights"
LATENTS = ["data.url=latents"]  # of benchmarks/gpu/tiny.py, as those below
EMBEDDED = ["embedding.encoder=none", "embedding.width=8"]  # by an encoder in each step
STORED = [*EMBEDDED, "embedding.url=embeddings", "data.flip=false"]
PRIOR = [
    "task=prior",
    "data.url=embeddings",
    "data.flip=false",
    *TEXT,
    "prior.width=16",
    "prior.depth=1",
    "prior.heads=2",
    "objective.prediction=x_0",
    "schedule.kind=cosine",
    "schedule.num_steps=10",
    "sampling.steps=4",
    "training.grid_every_steps=0",
]
CONTRASTIVE = [
    "task=contrastive",
    *TEXT,
    "contrastive.width=8",
    "contrastive.base_channels=8",
    "contrastive.groups=4",
    "contrastive.channel_mults=[1,2]",
    "contrastive.blocks_per_level=1",
    "training.grid_every_steps=0",
]
