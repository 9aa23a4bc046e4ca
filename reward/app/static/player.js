// One clock for several videos: play, pause, seek, step, speed and loop for all of them. The slowest sets the time; those ahead of it wait.
// Knows nothing of tasks. Also keeps which parts of each clip were on the screen.
const BINS = 20; // parts of a clip that count as watched or not
const SLOWER = 0.85;
const MOST_GAP = 0.6; // seconds between two looks that still count as watching
const LOADING_MS = 20_000;

export class Player extends EventTarget {
  // videos: elements with a source. fps: of the finest clip. Events: "tick" (the time moved), "state" (playing, failed or ready changed).
  constructor(videos, fps) {
    super();
    this.videos = videos;
    this.frame = 1 / fps;
    this.rate = 1;
    this.loop = true;
    this.playing = false;
    this.visible = new Set(videos.keys());
    this.failed = new Set();
    this.seen = videos.map(() => new Uint8Array(BINS));
    this.ms = videos.map(() => 0);
    this._held = new Set();
    this._last = videos.map(() => 0);
    this._closed = false;
    this._wanted = null; // where the last seek goes while another one runs
    this.ready = Promise.all(videos.map((video, i) => this._loaded(video, i))).then(() => this._say("state"));
  }

  _loaded(video, i) {
    return new Promise((done) => {
      const fail = () => {
        clearTimeout(late);
        this.failed.add(i);
        this._say("state");
        done();
      };
      const late = setTimeout(fail, LOADING_MS);
      const good = () => {
        clearTimeout(late);
        done();
      };
      video.addEventListener("error", fail, { once: true });
      if (video.error) fail();
      else if (video.readyState >= 2) good();
      else video.addEventListener("loadeddata", good, { once: true });
    });
  }

  _say(name) {
    this.dispatchEvent(new Event(name));
  }

  _good() {
    return this.videos.map((video, i) => [video, i]).filter(([video, i]) => !this.failed.has(i) && Number.isFinite(video.duration));
  }

  drop(i) {
    // A clip that is not shown any more: it does not hold up the others.
    this.failed.add(i);
    this.videos[i].pause();
    this._say("state");
  }

  get duration() {
    return Math.max(0, ...this._good().map(([video]) => video.duration));
  }

  get time() {
    const running = this._good().filter(([video]) => !over(video));
    if (running.length) return Math.min(...running.map(([video]) => video.currentTime));
    return this.duration;
  }

  watched(i) {
    return this.seen[i].reduce((sum, each) => sum + each, 0) / BINS;
  }

  restore(seen, ms) {
    // What was watched before the page was left.
    seen.forEach((parts, i) => parts.forEach((on, bin) => on && (this.seen[i][bin] = 1)));
    ms.forEach((n, i) => (this.ms[i] = n));
  }

  async play() {
    await this.ready;
    if (this._closed || this.playing || !this._good().length) return;
    this.playing = true;
    this._say("state");
    if (this.time >= this.duration - this.frame / 2) await this._go(0);
    await this._start();
  }

  async _start() {
    this._held.clear();
    const running = this._good().filter(([video]) => !over(video));
    for (const [video] of running) video.playbackRate = this.rate;
    await Promise.all(running.map(([video]) => video.play().catch(() => {})));
    if (!this.playing) return this._still();
    this._at = performance.now();
    this.videos.forEach((video, i) => (this._last[i] = video.currentTime));
    cancelAnimationFrame(this._next);
    this._next = requestAnimationFrame(() => this._look());
  }

  _still() {
    for (const video of this.videos) video.pause();
  }

  pause() {
    if (!this.playing) return;
    this.playing = false;
    cancelAnimationFrame(this._next);
    this._still();
    this._say("state");
  }

  toggle() {
    return this.playing ? this.pause() : this.play();
  }

  _look() {
    if (!this.playing || this._closed) return;
    const now = performance.now();
    this._watch(now - this._at);
    this._at = now;
    const good = this._good();
    const running = good.filter(([video]) => !over(video));
    if (!running.length) {
      this._ended();
      return;
    }
    const slowest = Math.min(...running.map(([video]) => video.currentTime));
    for (const [video, i] of running) {
      const ahead = (video.currentTime - slowest) / this.frame;
      if (this._held.has(i)) {
        if (ahead > 0.25) continue;
        this._held.delete(i);
        video.playbackRate = this.rate;
        video.play().catch(() => {});
      } else if (ahead > 0.7) {
        this._held.add(i);
        video.pause();
      } else {
        const wanted = ahead > 0.2 ? this.rate * SLOWER : this.rate;
        if (video.playbackRate !== wanted) video.playbackRate = wanted;
      }
    }
    this._say("tick");
    this._next = requestAnimationFrame(() => this._look());
  }

  async _ended() {
    if (!this.loop) {
      this.pause();
      this._say("tick");
      return;
    }
    await this._go(0);
    if (this.playing && !this._closed) await this._start();
  }

  _watch(ms) {
    if (document.visibilityState !== "visible") return;
    for (const [video, i] of this._good()) {
      const [from, to] = [this._last[i], video.currentTime];
      this._last[i] = to;
      if (!this.visible.has(i)) continue;
      if (this.playing && !over(video)) this.ms[i] += Math.min(ms, 1000 * MOST_GAP);
      const first = to >= from && to - from < MOST_GAP * this.rate ? from : to;
      for (let bin = part(first, video); bin <= part(to, video); bin++) this.seen[i][bin] = 1;
    }
  }

  async seek(time) {
    // Where several are asked for at once, the last one counts.
    const waiting = this._wanted !== null;
    this._wanted = time;
    if (waiting) return;
    await this.ready;
    const was = this.playing;
    cancelAnimationFrame(this._next);
    this._still();
    while (this._wanted !== null) {
      const to = this._wanted;
      await this._go(to);
      if (this._wanted === to) this._wanted = null;
    }
    this._watch(0);
    this._say("tick");
    if (was && this.playing && !this._closed) await this._start();
  }

  async _go(time) {
    const to = Math.max(0, Math.min(time, this.duration));
    this._still();
    await Promise.all(
      this._good().map(([video, i]) => {
        const place = Math.min(to, Math.max(0, video.duration - this.frame / 2));
        this._last[i] = place;
        if (Math.abs(video.currentTime - place) < 1e-4 && !video.ended) return null;
        return new Promise((done) => {
          const late = setTimeout(done, 5_000);
          video.addEventListener("seeked", () => (clearTimeout(late), done()), { once: true });
          video.currentTime = place;
        });
      }),
    );
  }

  step(frames) {
    this.pause();
    const at = Math.floor(this.time / this.frame + 1e-6) + frames;
    return this.seek((Math.max(0, at) + 0.5) * this.frame);
  }

  speed(rate) {
    this.rate = rate;
    for (const video of this.videos) video.playbackRate = rate;
  }

  sound(i) {
    // Only one clip is heard at a time; null for none.
    this.videos.forEach((video, at) => (video.muted = at !== i));
  }

  close() {
    this._closed = true;
    this.playing = false;
    cancelAnimationFrame(this._next);
    for (const video of this.videos) {
      video.pause();
      video.removeAttribute("src");
      video.load();
    }
  }
}

const over = (video) => video.ended || video.currentTime >= video.duration - 1e-3;
const part = (time, video) => Math.min(BINS - 1, Math.max(0, Math.floor((time / video.duration) * BINS)));
