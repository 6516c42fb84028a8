"""The model card: what is known of a sparse model, for people and for the hub."""

from .card import CARD_FILE, is_hand_written, make_card, read_record, write_card


__all__ = ["CARD_FILE", "is_hand_written", "make_card", "read_record", "write_card"]
