// Pictures to start from: a file or the camera, cut to the shape that is drawn.

const QUALITY = 0.92;

// Return a picture or a video's frame, cut to [width, height] from its middle: a file's bytes, of this media type.
export async function still(source, [width, height], type) {
  const own = [source.videoWidth || source.width, source.videoHeight || source.height];
  const scale = Math.max(width / own[0], height / own[1]);
  const size = own.map((side) => side * scale);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(source, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
  const blob = await canvas.convertToBlob({ type, quality: QUALITY });
  return new Uint8Array(await blob.arrayBuffer());
}

export class Camera {
  #stream = null;

  constructor(video) {
    this.video = video;
  }

  // Browsers give no camera to a page that came over plain HTTP from another machine.
  static get exists() {
    return Boolean(navigator.mediaDevices?.getUserMedia);
  }

  get on() {
    return this.#stream !== null;
  }

  async start() {
    this.#stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
    this.video.srcObject = this.#stream;
    await this.video.play();
  }

  // Call a function when there is another frame.
  next(call) {
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(call);
    else setTimeout(call, 33);
  }

  stop() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = this.video.srcObject = null;
  }
}
