// Answers on their way to disk, in order. Each is kept in the browser until the server has confirmed it, and carries an
// id of its own, so that sending it twice is recording it once. Nothing is lost when the server dies between the two.
export class Outbox {
  constructor(token, onState, onTrouble) {
    this.token = token;
    this.onState = onState;
    this.onTrouble = onTrouble;
    this.waiting = [];
    this.sending = false;
  }

  restore(owner) {
    this.store = `brushwork.outbox.${owner}`;
    const kept = JSON.parse(localStorage.getItem(this.store) ?? "[]");
    this.waiting.push(...kept);
    this.keep();
    this.flush();
    return kept.length;
  }

  keep() {
    if (this.waiting.length) localStorage.setItem(this.store, JSON.stringify(this.waiting));
    else localStorage.removeItem(this.store);
  }

  send(action, body) {
    this.waiting.push({ action, body: { ...body, id: crypto.randomUUID() } });
    this.keep();
    this.flush();
  }

  request(path, options = {}) {
    return fetch(path, { ...options, headers: { "x-brushwork-token": this.token, ...(options.headers ?? {}) }, cache: "no-store" });
  }

  async flush() {
    if (this.sending) return;
    this.sending = true;
    let delay = 250;
    while (this.waiting.length) {
      const { action, body } = this.waiting[0];
      try {
        const response = await this.request(`/api/${action}`, { method: "POST", body: JSON.stringify(body) });
        if (response.status >= 500 || response.status === 403) throw new Error((await response.text()).slice(0, 300));
        this.waiting.shift();
        this.keep();
        this.onTrouble(null);
        delay = 250;
        if (response.ok) this.onState(await response.json(), action, this.waiting.length);
        else this.onState(null, action, this.waiting.length);
      } catch (error) {
        this.onTrouble(error);
        await new Promise((resolve) => setTimeout(resolve, delay));
        delay = Math.min(delay * 2, 4000);
      }
    }
    this.sending = false;
  }
}
