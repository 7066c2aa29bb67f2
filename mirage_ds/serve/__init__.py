"""`mirage-ds serve`: a model folder behind OpenAI's chat completions, over the continuous decoder.

engine    a thread that decodes whatever is asked, all rows together; job: what it is handed
body      a request's JSON → what is asked, with each fault's status
prompt    messages and pictures → the encoded prompt that training saw
answers   tokens as they come → texts, stops, usage, OpenAI's two forms of a reply
app       the routes, errors and metrics
spec      the flags
command   `mirage-ds serve`: loads, listens, stops
"""
