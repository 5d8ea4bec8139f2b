"""The rules of `service.store` as scripts that a Redis or Valkey server runs, each in one step.

A session is one hash: `epoch`, `owner`, `place` (frame and sequence of the latest save; empty after an attach), `record`, `created`, `ended`.
Arguments of each script are the owner, idle time and age in milliseconds (0: no age), then its own for each key. Each returns one value per key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

PLACE = "{:020d}{:020d}"  # so that strings compare as the numbers do: the numbers of scripts are floating point
_HEAD = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local owner, idle, age = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local function keep(key, created)
  local left = idle
  if age > 0 then left = math.min(left, created + age - now) end
  redis.call('PEXPIRE', key, math.max(1, left))
end
"""
_ATTACH = """
local held = redis.call('HMGET', KEYS[1], 'epoch', 'ended', 'created', 'record')
local epoch = tonumber(held[1] or 0) + 1
if not held[1] or held[2] then
  if ARGV[4] == '0' then return {false} end
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'owner', owner, 'place', '', 'created', now)
  keep(KEYS[1], now)
  return {{epoch, false}}
end
redis.call('HSET', KEYS[1], 'epoch', epoch, 'owner', owner, 'place', '')
keep(KEYS[1], tonumber(held[3]))
return {{epoch, held[4]}}
"""
_LOAD = """
local held = redis.call('HMGET', KEYS[1], 'epoch', 'ended', 'record')
if not held[1] or held[2] then return {false} end
return {{tonumber(held[1]), held[3]}}
"""
_SAVE = """
local outcomes = {}
for i, key in ipairs(KEYS) do
  local epoch, place, record = tonumber(ARGV[3 * i + 1]), ARGV[3 * i + 2], ARGV[3 * i + 3]
  local held = redis.call('HMGET', key, 'epoch', 'owner', 'place', 'ended', 'created')
  local known, outcome = tonumber(held[1] or 0), 'saved'
  if epoch <= known then
    if held[4] then outcome = 'ended'
    elseif epoch < known or owner ~= held[2] then outcome = 'fenced'
    elseif place < held[3] then outcome = 'stale' end
  end
  if outcome == 'saved' and epoch == known then
    redis.call('HSET', key, 'place', place, 'record', record)
    keep(key, tonumber(held[5]))
  elseif outcome == 'saved' then
    local created = tonumber(held[5] or now)
    if held[4] then
      created = now
      redis.call('HDEL', key, 'ended')
    end
    redis.call('HSET', key, 'epoch', epoch, 'owner', owner, 'place', place, 'created', created, 'record', record)
    keep(key, created)
  end
  outcomes[i] = outcome
end
return outcomes
"""
_TOUCH = """
local there = {}
for i, key in ipairs(KEYS) do
  local held = redis.call('HMGET', key, 'created', 'ended')
  there[i] = 0
  if held[1] and not held[2] then
    keep(key, tonumber(held[1]))
    there[i] = 1
  end
end
return there
"""
_END = """
local epoch, mark = tonumber(ARGV[4]), tonumber(ARGV[5])
local held = redis.call('HMGET', KEYS[1], 'epoch', 'owner', 'ended')
local known = tonumber(held[1] or 0)
if known >= epoch and not held[3] and not (known == epoch and held[2] == owner) then return {0} end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', math.max(epoch, known), 'owner', owner, 'place', '', 'ended', 1, 'created', now)
redis.call('PEXPIRE', KEYS[1], mark)
return {1}
"""


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str


def _script(body: str) -> Script:
    text = _HEAD + body
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


SCRIPTS = ATTACH, LOAD, SAVE, TOUCH, END = tuple(map(_script, (_ATTACH, _LOAD, _SAVE, _TOUCH, _END)))
