"""Needle in a haystack: can the model find a number in a long text?"""
