"""What a measured loss means for who uses the artifact."""

LARGE_KL = 0.1  # nats: one token in ten or so is another one than the 16-bit cache's
BROKEN_KL = 1.0  # nats: the model's words are others
REFUSED_KL = 3.0  # nats: a word keeps a twentieth of its probability; not written unless accepted


def loss_words(kl: float) -> str | None:
    """A sentence on KL in nats between the model on its 16-bit cache and on the packed one; None
    where it is small."""
    if not kl > LARGE_KL:
        return None
    what = "the model is broken" if kl > BROKEN_KL else "the model's answers will differ"
    return f"A KL of {kl:.3f} nats is large: {what} on this cache; a larger budget or a longer calibration text helps."
