"""Rating by people, who say which of two reconstructions of about the same bytes is closer to the original."""

from rnncodec.rating.scores import Summary, bootstrap, bradley_terry, summarize
from rnncodec.rating.server import Server
from rnncodec.rating.study import Study, match
from rnncodec.rating.votes import Vote, Votes

__all__ = ["Server", "Study", "Summary", "Vote", "Votes", "bootstrap", "bradley_terry", "match", "summarize"]
