"""What our own work adds to a card's step, without a card: beside one that is pretended.

    python benchmarks/host.py [--step 8] [--clients 1 32 128]

A pretended card takes so many milliseconds for each step, from its launch on, whatever the host
does meanwhile; all else is real: steps are built as for a card, tokens sampled, texts made, and
streams sent over sockets to clients in a process of their own.
"""

import argparse
import sys
import time

from benchmark import ROOT, figures, free_port, started


def serve(port: int, seconds: float) -> None:
    """Serve what the pretended card says."""
    sys.path.insert(0, str(ROOT))
    import torch
    import uvicorn

    import api
    import engine.scheduling.stepper
    from engine.attention.forward_batch import ForwardBatch
    from engine.sequence import ScheduledBatch, Token
    from tests.conftest import ScriptedRunner, byte_tokenizer, chat_model

    torch.set_num_threads(1)

    class Card(ScriptedRunner):
        def forward(self, work: ScheduledBatch) -> torch.Tensor:
            step = ForwardBatch(work, "in place").on(self.device)
            self.ids.index_copy_(0, step.write, step.ids)
            self.ready = time.perf_counter() + seconds
            logits = torch.zeros(len(work), self.vocabulary)
            logits[:, letter] = 1.0
            return logits

    def sample_later(*given: object) -> list[Token]:
        tokens = sample(*given)
        time.sleep(max(0.0, card.ready - time.perf_counter()))
        return tokens

    tokenizer = byte_tokenizer()
    letter = tokenizer.convert_tokens_to_ids("x")
    card = Card(tokenizer, rows=400_000)
    sample = engine.scheduling.stepper.sample_tokens
    engine.scheduling.stepper.sample_tokens = sample_later
    app = api.build_app(
        api.Settings(chat_page=False, max_waiting=1000),
        lambda settings: chat_model(card, tokenizer, 4096, max_batch=256),
    )
    uvicorn.run(app, port=port, http=api.Connection, log_level="error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=float, default=8, help="the card's milliseconds a step")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--tokens", type=int, default=200, help="tokens an answer")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.step / 1000)
    port = free_port()
    command = [sys.executable, __file__, "--serve", str(port), "--step", str(options.step)]
    print(f"A card of {options.step:g} ms a step.\n")
    print("| clients | tokens/s | a step | beyond the card | first p50 |")
    print("| --- | --- | --- | --- | --- |")
    with started("a pretended card", command, port) as server:
        server.load(4, 4, 20, 0)
        for clients in options.clients:
            seen = figures(server.load(clients, clients, options.tokens, 1000))
            step = 1000 * seen["later p50"]
            print(
                f"| {clients} | {seen['tokens/s']:.0f} | {step:.2f} ms"
                f" | {step - options.step:.2f} ms | {seen['first p50']:.3f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
